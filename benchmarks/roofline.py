"""The physical limit: what a round must compute and move, over what this machine can.

``python -m benchmarks.roofline WORKLOAD...`` prints one JSON object.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.tasks.models import cnn, logistic
from benchmarks.workloads import Workload, read_workload

_FLOAT_BYTES = 4
_EXAMPLES = {"w2": 60, "w1": 50}


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What the machine does at best."""

    gemm_flops_1: float
    """Float32 operations a second of a large matrix product on one thread."""
    gemm_flops_all: float
    """The same on every core."""
    copy_bytes_per_s: float
    """Bytes read and written a second by large copies, on every core."""
    threads: int


@dataclass(frozen=True, kw_only=True)
class Need:
    """The least that a round must do, whoever does it."""

    operations: float
    """Additions and multiplications of forward and backward passes."""
    bytes: float
    """Each example read once, and each client's weights read and written once."""


def measure_machine() -> Machine:
    """Times large products and copies; a second or two."""
    threads = torch.get_num_threads()
    size = 2048
    left, right = torch.randn(size, size), torch.randn(size, size)
    source = torch.randn(64 << 20)
    target = torch.empty_like(source)
    torch.set_num_threads(1)
    alone = best_s(lambda: torch.mm(left, right))
    torch.set_num_threads(threads)
    together = best_s(lambda: torch.mm(left, right))
    copying = best_s(lambda: target.copy_(source))
    return Machine(
        gemm_flops_1=2 * size**3 / alone,
        gemm_flops_all=2 * size**3 / together,
        copy_bytes_per_s=2 * source.numel() * _FLOAT_BYTES / copying,
        threads=threads,
    )


def best_s(work: Callable[[], object], *, times: int = 8) -> float:
    """The least time of several: the limit, not the usual."""
    took = []
    for _ in range(times):
        began = time.perf_counter()
        work()
        took.append(time.perf_counter() - began)
    return min(took)


def need_of(model: nn.Module, example: torch.Tensor, *, examples: int, clients: int) -> Need:
    """What a round over ``clients`` of so many examples each needs, for one epoch."""
    with FlopCounterMode(display=False) as counter:
        outputs = model(example.unsqueeze(0))
        loss = nn.functional.cross_entropy(outputs, torch.zeros(1, dtype=torch.long))
        torch.autograd.backward(loss)
    weights = sum(weight.numel() for weight in model.parameters())
    return Need(
        operations=float(counter.get_total_flops() * examples * clients),
        bytes=float(_FLOAT_BYTES * clients * (examples * example.numel() + 2 * weights)),
    )


def floor_s(need: Need, machine: Machine) -> float:
    """No round can be quicker: the larger of computing and moving."""
    return max(need.operations / machine.gemm_flops_all, need.bytes / machine.copy_bytes_per_s)


def workload_need(workload: Workload) -> Need:
    """What a round of W1 or W2 needs."""
    flat = workload.partition == "w2"
    example = torch.zeros(784) if flat else torch.zeros(1, 28, 28)
    return need_of(
        logistic() if flat else cnn(),
        example,
        examples=_EXAMPLES[workload.partition],
        clients=workload.cohort,
    )


def main(names: list[str]) -> None:
    """Prints the machine's figures, and each workload's need and floor."""
    machine = measure_machine()
    floors = {}
    for name in names:
        need = workload_need(read_workload(name))
        floors[name] = {**asdict(need), "floor_s": floor_s(need, machine)}
    print(json.dumps({"machine": asdict(machine), "workloads": floors}))


if __name__ == "__main__":
    main(sys.argv[1:])
