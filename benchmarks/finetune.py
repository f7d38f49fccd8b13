"""Fine-tuning: what two processes give over one and send, and what dividing a model saves.

``make bench NAME=finetune`` runs it; ``runs/bench/finetune.json`` has the figures, and
``runs/bench/finetune.png`` the time against workers beside the ideal T_s/N. Workers have one thread
each and talk by gloo over loopback. Systems alternate within a repeat. Wall time is honest only on
a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks.deployment import machine
from benchmarks.figures import Check, Row, at_least, at_most, row
from benchmarks.gpt import GPT, Tokens, bare_loop
from fedcore import Task
from fedcore.config.run import RunConfig
from fedcore.files import write_json
from server.finetune import control
from server.finetune.costs import Costs, all_reduce_s, flops_per_example, matrix_peak
from server.finetune.curve import Curve
from server.finetune.loop import train_start
from server.finetune.scaling import ScalingReport, report_of
from server.finetune.timing import Timed

OUT = Path("runs/bench")
PARTS = ("speed", "compressed", "divided")
_WARM = 2
"""Steps before those that count."""


@dataclass(frozen=True)
class Sizes:
    """How large the model is, and how long it trains."""

    layers: int
    width: int
    context: int
    batch: int
    steps: int
    repeats: int
    long: int
    """Steps after which losses are compared."""


FULL = Sizes(layers=6, width=372, context=128, batch=32, steps=12, repeats=5, long=300)
LONG = replace(FULL, batch=4)
"""Enough steps for losses to part, in an eighth of the time. What travels is that of any batch."""
LARGE = Sizes(layers=6, width=768, context=32, batch=4, steps=50, repeats=3, long=0)
"""Weights, gradients and optimiser state take far more memory than activations."""
QUICK = Sizes(layers=2, width=64, context=16, batch=4, steps=6, repeats=1, long=20)


@dataclass(frozen=True)
class Course:
    """One training in a group of processes."""

    losses: tuple[float, ...]
    seconds: float
    """Time of the steps after the first few."""
    steps: int
    busy_s: tuple[float, ...]
    sent_bytes: int
    """What one process gave to collectives in the hook or DDP's buckets, over all steps."""
    peak_bytes: int
    """Growth of a process's resident memory since before the model was built; the largest."""

    def timed(self, sizes: Sizes) -> Timed:
        """Returns the steps that count, in the terms of the product's report."""
        examples, world = self.steps * sizes.batch, len(self.busy_s)
        peak = world * self.peak_bytes
        return Timed(world, self.steps, examples, self.seconds, self.busy_s, peak, fits=True)


def grouped(world: int, work: Callable[[int, int], Any]) -> list[Any]:
    """Runs ``work(rank, world)`` in forked processes that share a gloo group."""
    context, started = get_context("fork"), []
    with tempfile.TemporaryDirectory() as folder:

        def serve(rank: int, sent: Any) -> None:
            torch.set_num_threads(1)
            if world > 1:
                store = f"file://{folder}/store"
                dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
            sent.send(work(rank, world))
            os._exit(0)

        for rank in range(world):
            here, there = context.Pipe(duplex=False)
            process = context.Process(target=serve, args=(rank, there))
            process.start()
            there.close()
            started.append((process, here))
        found = [here.recv() for _, here in started]
        for process, _ in started:
            process.join()
    return found


def train(sizes: Sizes, world: int, steps: int, **settings: Any) -> Course:
    """Trains the GPT with fedcore's loop."""

    def work(rank: int, world: int) -> Any:
        before = _resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        data = Tokens(steps * sizes.batch, sizes.context)
        finetune = {"epochs": 1, "batch_size": sizes.batch, "optimizer": "adamw"}
        finetune |= {"learning_rate": 1e-3, "remember": 0.0} | settings
        run = RunConfig.model_validate({"name": "b", "task": "b.py", "finetune": finetune})
        task = Task(
            name="characters",
            kind="next_token",
            model=lambda: nn.Identity(),
            clients=lambda folder: [],
            client_data=lambda client, folder: data,
            example_input=data[0][0],
        )
        torch.manual_seed(0)
        model, curve, sent = GPT(sizes.layers, sizes.width, sizes.context), Curve(), list[int]()
        _count_sent(sent)
        control.MOST_STEPS = 1  # the time of each step
        device = torch.device("cpu")
        group = control.make_group(device) if world > 1 else control.ALONE
        train_start(model, task, data, run, device, remember=0.0, group=group, curve=curve)
        return curve, sum(sent), _resident("VmHWM") - before

    found = grouped(world, work)
    curve = found[0][0]
    counted = [part for part in curve.parts if part.first_step >= _WARM]
    return Course(
        losses=curve.losses,
        seconds=sum(part.seconds for part in counted),
        steps=sum(len(part.losses) for part in counted),
        busy_s=tuple(map(sum, zip(*(part.busy_s for part in counted), strict=True))),
        sent_bytes=max(one[1] for one in found),
        peak_bytes=max(one[2] for one in found),
    )


def _resident(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    raise RuntimeError(name)


def _count_sent(sent: list[int]) -> None:
    """Counts the bytes of gradients that communication hooks hand to collectives."""
    all_reduce = dist.all_reduce

    def counted(tensor: Tensor, *rest: Any, **more: Any) -> Any:
        if tensor.dtype is not torch.float64:  # losses and requests to stop
            sent.append(tensor.numel() * tensor.element_size())
        return all_reduce(tensor, *rest, **more)

    dist.all_reduce = counted


def costs_of(sizes: Sizes, world: int) -> Costs:
    """Measures what a step costs besides time, as `fedcore finetune --report` does."""

    def work(rank: int, world: int) -> Costs:
        model, cpu = GPT(sizes.layers, sizes.width, sizes.context), torch.device("cpu")
        parameters = sum(each.numel() for each in model.parameters())
        return Costs(
            parameters=parameters,
            flops_per_example=flops_per_example(
                model,
                lambda outputs, y: nn.functional.cross_entropy(outputs.flatten(0, 1), y.flatten()),
                Tokens(2, sizes.context),
                cpu,
                rows=2,
            ),
            tokens_per_example=sizes.context,
            peak_flops=matrix_peak(cpu),
            all_reduce_s=all_reduce_s(parameters, cpu) if world > 1 else None,
            energy_j=None,
        )

    found = grouped(world, work)
    peak = sum(one.peak_flops for one in found) / world
    return replace(found[0], peak_flops=peak)


def measure(sizes: Sizes, price_per_hour: float, parts: Sequence[str]) -> dict[str, Any]:
    """Runs the parts; returns rows and checks."""
    rows, checks = list[Row](), list[Check]()
    if "speed" in parts:
        rows, checks = _speed(sizes, price_per_hour)
    if "compressed" in parts:
        checks += _compressed(LONG if sizes is FULL else sizes)
    if "divided" in parts:
        cost, saved = _divided(LARGE if sizes is FULL else sizes)
        rows, checks = [*rows, cost], checks + saved
    return {"rows": [asdict(each) for each in rows], "checks": [asdict(each) for each in checks]}


def _speed(sizes: Sizes, price_per_hour: float) -> tuple[list[Row], list[Check]]:
    reports, over_bare = list[ScalingReport](), list[float]()
    for _ in range(sizes.repeats):
        one = train(sizes, 1, sizes.steps)
        two = train(sizes, 2, sizes.steps)
        bare_s = grouped(1, lambda rank, world: bare_loop(sizes, _WARM))[0]
        # CPU time of one thread each: equal to wall time where nothing else runs.
        over_bare.append(bare_s / (sizes.steps - _WARM) / (one.busy_s[0] / one.steps))
        timings = [(one.timed(sizes), costs_of(sizes, 1)), (two.timed(sizes), costs_of(sizes, 2))]
        reports.append(report_of(timings, batch_size=sizes.batch, price_per_hour=price_per_hour))
    checks = [
        at_least("two workers over one, tokens a second",
                 [2 * report.rows[1].efficiency for report in reports], 1.7),
        at_least("one worker over a bare loop, tokens a CPU second", over_bare, 0.97),
    ]  # fmt: skip
    OUT.mkdir(parents=True, exist_ok=True)
    median = sorted(reports, key=lambda report: report.rows[1].step_s)[len(reports) // 2]
    median.plot(OUT / "finetune.png")
    print(median.table())
    return _rows(reports), checks


_FIGURES = {
    "tokens_per_s": "1/s",
    "efficiency": "fraction",
    "load_balance": "fraction",
    "communication": "fraction",
    "flops_utilisation": "fraction",
    "cost_per_million": "currency",
}


def _rows(reports: list[ScalingReport]) -> list[Row]:
    found = []
    for number, system in enumerate(("1 worker", "2 workers")):
        for metric, unit in _FIGURES.items():
            values = [getattr(report.rows[number], metric) for report in reports]
            if None not in values:
                found.append(row(system, "gpt", metric, unit, values))
    return found


def _compressed(sizes: Sizes) -> list[Check]:
    model = GPT(sizes.layers, sizes.width, sizes.context)
    parameters = sum(each.numel() for each in model.parameters())
    whole, found = train(sizes, 2, sizes.long), []
    for name, least, first in (("bf16", 2.0, 0), ("powersgd", 8.0, 10)):
        course = train(sizes, 2, sizes.long, communication=name)
        whole_steps = 4 * parameters * first  # steps whose gradients travel whole
        each = (course.sent_bytes - whole_steps) / (len(course.losses) - first)
        found.append(at_least(f"bytes a step, whole over {name}", [4 * parameters / each], least))
        gap = abs(course.losses[-1] / whole.losses[-1] - 1)
        found.append(at_most(f"loss after {sizes.long} steps, {name} against whole", [gap], 0.02))
    return found


def _divided(sizes: Sizes) -> tuple[Row, list[Check]]:
    import_module("torch.distributed.fsdp")  # its modules' memory is not a model's
    gaps, memory, busy = list[float](), list[float](), list[float]()
    for _ in range(sizes.repeats):
        copied = train(sizes, 2, sizes.steps, shard="never")
        divided = train(sizes, 2, sizes.steps, shard="always")
        gaps.append(max(abs(a - b) for a, b in zip(copied.losses, divided.losses, strict=True)))
        memory.append(divided.peak_bytes / copied.peak_bytes)
        busy.append(sum(divided.busy_s) / sum(copied.busy_s))
    cost = row("FSDP2", "gpt", "cpu_time_over_ddp", "fraction", busy)
    return cost, [
        at_most(f"loss over {sizes.steps} steps, FSDP2 against DDP", gaps, 1e-4),
        at_most("peak memory, FSDP2 over DDP", memory, 0.65),
    ]


def main() -> int:
    """Measures, prints and writes; returns 1 when a check does not hold."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a tiny model, to see that all runs")
    parser.add_argument("--price-per-hour", type=float, default=0.1, help="of the machine")
    parser.add_argument("--part", choices=PARTS, help="only this part, into finetune-PART.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    parts = (options.part,) if options.part else PARTS
    found = measure(QUICK if options.quick else FULL, options.price_per_hour, parts)
    name = f"finetune-{options.part}" if options.part else "finetune"
    OUT.mkdir(parents=True, exist_ok=True)
    write_json(OUT / f"{name}.json", {"machine": machine(), **found})
    for each in found["rows"] + found["checks"]:
        print({name: value for name, value in each.items() if value is not None})
    return 0 if all(check["holds"] for check in found["checks"]) else 1


if __name__ == "__main__":
    sys.exit(main())
