"""What a step of fine-tuning costs: arithmetic, communication and energy, measured in a process."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fedcore.seeds import kept_streams
from fedcore.task.definition import Examples, size_of
from fedcore.training.batches import gather
from server.process.energy import gpu_joules, joules_between, package_counters

_SIDE = 1024
_REPEATS = 5


@dataclass(frozen=True)
class Costs:
    """What a step costs besides time."""

    parameters: int
    """Trained parameters."""
    flops_per_example: float | None
    """Operations of a forward and a backward pass; None where they could not be counted."""
    tokens_per_example: int | None
    peak_flops: float
    """Operations a second that a worker reaches in matrix products, the mean over workers."""
    all_reduce_s: float | None
    """Time to add up gradients over the workers, which do nothing else; None for one worker."""
    energy_j: float | None
    """Energy of the counted steps; None where the machine does not report it."""


def matrix_peak(device: torch.device, dtype: torch.dtype = torch.float32) -> float:
    """Returns the operations a second that this process reaches in large matrix products."""
    one = torch.randn(_SIDE, _SIDE, device=device).to(dtype)
    best = 0.0
    for _ in range(_REPEATS):
        _wait_for(device)
        started = time.perf_counter()
        one @ one
        _wait_for(device)
        best = max(best, 2 * _SIDE**3 / (time.perf_counter() - started))
    return best


def all_reduce_s(parameters: int, device: torch.device) -> float:
    """Returns the time in which processes of a group add up gradients while they do nothing else.

    Every process of the default group must call this.

    Args:
        parameters: Number of trained parameters; their gradients travel in float32.
        device: The device of this process.
    """
    gradients = torch.ones(parameters, device=device)
    dist.all_reduce(gradients)
    _wait_for(device)
    started = time.perf_counter()
    for _ in range(_REPEATS):
        dist.all_reduce(gradients)
    _wait_for(device)
    return (time.perf_counter() - started) / _REPEATS


def flops_per_example(
    model: nn.Module,
    loss_of: Callable[[Any, Tensor], Tensor],
    examples: Examples,
    device: torch.device,
    *,
    rows: int,
) -> float:
    """Returns the operations of a forward and a backward pass, counted by torch, for one example.

    What a step repeats to save memory, a teacher's pass and the optimiser do not count.

    Args:
        model: The model, on ``device``; its gradients are dropped.
        loss_of: The task's loss.
        examples: Where a batch comes from.
        device: The device.
        rows: Examples of that batch.
    """
    inputs, targets = gather(examples, list(range(min(max(2, rows), size_of(examples)))))
    counter = FlopCounterMode(display=False)
    # Attention as products that the counter knows.
    with kept_streams(), sdpa_kernel(SDPBackend.MATH), counter:
        loss = loss_of(model(inputs.to(device)), targets.to(device))
        torch.autograd.backward(loss)
    model.zero_grad(set_to_none=True)
    return float(counter.get_total_flops()) / len(targets)


@dataclass
class EnergyMeter:
    """Measures the energy of this process's GPU, or of all processor packages of the machine."""

    device: torch.device
    _packages: dict[str, tuple[int, int]] = field(default_factory=dict)
    _gpu_j: float | None = None

    def start(self) -> None:
        """Begins to measure."""
        self._packages = package_counters()
        if self.device.type == "cuda":
            self._gpu_j = gpu_joules(self.device.index or 0)

    def joules(self) -> float | None:
        """Returns the energy since `start`; None where the machine does not report it."""
        if self.device.type == "cuda":
            now_j = gpu_joules(self.device.index or 0)
            return None if now_j is None or self._gpu_j is None else now_j - self._gpu_j
        return joules_between(self._packages, package_counters())


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
