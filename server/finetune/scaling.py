"""How fine-tuning scales: time against workers beside the ideal T_1/N, and what a step costs.

In: timings with 1, 2, 4, ... workers. Out: a `ScalingReport`, as table, plot and JSON. Start with
`measure_scaling`; `report_of` is the arithmetic alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from fedcore.config.run import RunConfig
from fedcore.errors import TrainingError
from fedcore.files import write_atomic
from fedcore.finite import finite_or_none
from fedcore.observability.words import NOTHING, bytes_text, counted, figure
from fedcore.task.model import FullModel, checkpoint_bytes
from server.finetune.costs import Costs
from server.finetune.timing import Timed, timing_processes

_WINDOW_S = 3.0
_LIMIT_S = 300.0
_NO_ENERGY = "energy: not available here"


@dataclass(frozen=True)
class ScalingRow:
    """Training with one number of workers."""

    workers: int
    step_s: float
    ideal_s: float
    """Time of one worker's step, divided by their number."""
    efficiency: float
    """``ideal_s`` over ``step_s``."""
    communication: float | None
    """Time in which gradients alone would travel, over ``step_s``. Some of it overlaps with the
    backward pass. None for one worker."""
    load_balance: float
    """CPU time of the least busy worker over that of the busiest one."""
    examples_per_s: float
    tokens_per_s: float | None
    flops_utilisation: float | None
    """Operations of forward and backward passes a second, over what the workers reach in matrix
    products; None where nothing could be counted."""
    peak_bytes: int
    """The most memory of all workers together."""
    energy_per_step_j: float | None
    """Of the GPUs, or of all processor packages, whatever else runs there; None where the machine
    does not report it."""
    cost_per_million: float | None
    """Price of a million examples, or of a million tokens; None without a price."""


@dataclass(frozen=True)
class ScalingReport:
    """Time and cost of fine-tuning's steps by number of workers, see `fedcore.measure_scaling`.

    Example::

        report = fedcore.measure_scaling(task, "run.toml", model, finetune={"processes": 4})
        print(report.table())
        [(row.workers, row.efficiency) for row in report.rows]
    """

    rows: tuple[ScalingRow, ...]
    parameters: int
    flops_per_example: float | None
    """Operations of a forward and a backward pass; None where they could not be counted."""
    batch_size: int
    problems: tuple[str, ...] = ()
    """Numbers of workers that could not be measured, and why."""

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values for JSON."""
        found: dict[str, Any] = finite_or_none(asdict(self))
        found["rows"] = [finite_or_none(asdict(row)) for row in self.rows]
        return found

    def table(self) -> str:
        """Returns the rows as lines of text."""
        unit = "tokens" if any(row.tokens_per_s is not None for row in self.rows) else "examples"
        lines = [
            ("workers", "s/step", "ideal", "efficiency", "communication", "balance", f"{unit}/s",
             "FLOPs used", "memory", "J/step", f"cost/10^6 {unit}")
        ]  # fmt: skip
        for row in self.rows:
            rate = row.examples_per_s if row.tokens_per_s is None else row.tokens_per_s
            lines.append(
                (
                    str(row.workers),
                    figure(row.step_s),
                    figure(row.ideal_s),
                    _percent(row.efficiency),
                    _percent(row.communication),
                    _percent(row.load_balance),
                    figure(rate),
                    _percent(row.flops_utilisation),
                    bytes_text(row.peak_bytes),
                    figure(row.energy_per_step_j),
                    figure(row.cost_per_million),
                )
            )
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        text = [
            "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
            for line in lines
        ]
        if all(row.energy_per_step_j is None for row in self.rows):
            text.append(_NO_ENERGY)
        return "\n".join([*text, *self.problems])

    def plot(self, path: str | Path) -> None:
        """Writes the time of a step against workers as a PNG, beside the ideal.

        Raises:
            DiskFull: the disk has no room.
        """
        from matplotlib.figure import Figure

        workers = [row.workers for row in self.rows]
        picture = Figure(figsize=(5, 3.5), dpi=150, layout="constrained")
        axes = picture.subplots()
        axes.plot(workers, [row.step_s for row in self.rows], "o-", label="measured")
        axes.plot(workers, [row.ideal_s for row in self.rows], "--", label="ideal: T_1/N")
        axes.set(xlabel="workers", ylabel="seconds a step", xticks=workers, ylim=(0, None))
        axes.legend()
        drawn = BytesIO()
        picture.savefig(drawn, format="png", metadata={"Software": None})
        write_atomic(Path(path), drawn.getvalue())


def _percent(share: float | None) -> str:
    return NOTHING if share is None else f"{100 * share:.0f} %"


def report_of(
    timings: Sequence[tuple[Timed, Costs]],
    *,
    batch_size: int,
    price_per_hour: float | None,
    problems: Sequence[str] = (),
) -> ScalingReport:
    """Returns the report of timings, the first of which is with one worker.

    Args:
        timings: Speed and costs by number of workers.
        batch_size: Examples of a step.
        price_per_hour: Price of the machine, in any currency; None if not known.
        problems: Numbers of workers that could not be measured, and why.
    """
    alone, costs = timings[0]
    return ScalingReport(
        tuple(_row(alone, timed, each, price_per_hour) for timed, each in timings),
        costs.parameters,
        costs.flops_per_example,
        batch_size,
        tuple(problems),
    )


def _row(alone: Timed, timed: Timed, costs: Costs, price_per_hour: float | None) -> ScalingRow:
    rate, tokens = timed.examples_per_s, costs.tokens_per_example
    tokens_per_s = None if tokens is None else rate * tokens
    ideal_s = alone.step_s / timed.processes
    used = None
    if costs.flops_per_example:
        used = costs.flops_per_example * rate / (timed.processes * costs.peak_flops)
    sold = rate if tokens_per_s is None else tokens_per_s
    return ScalingRow(
        workers=timed.processes,
        step_s=timed.step_s,
        ideal_s=ideal_s,
        efficiency=ideal_s / timed.step_s,
        communication=None if costs.all_reduce_s is None else costs.all_reduce_s / timed.step_s,
        load_balance=min(timed.busy_s) / max(timed.busy_s) if max(timed.busy_s) else 1.0,
        examples_per_s=rate,
        tokens_per_s=tokens_per_s,
        flops_utilisation=used,
        peak_bytes=timed.peak_bytes,
        energy_per_step_j=None if costs.energy_j is None else costs.energy_j / timed.steps,
        cost_per_million=None if price_per_hour is None else price_per_hour / 3600 * 1e6 / sold,
    )


def workers_of(run: RunConfig) -> list[int]:
    """Returns the numbers of workers to measure: powers of two, and ``finetune.processes``."""
    most = run.finetune.processes
    return sorted({*(2**power for power in range(11) if 2**power < most), most})


def measure_steps(run: RunConfig, model: FullModel, note: Callable[[str], None]) -> ScalingReport:
    """Times some steps with each number of workers up to ``finetune.processes``.

    Args:
        run: The run; its task is in a file.
        model: What training starts from. Not changed.
        note: Callback with each measurement, in words.

    Raises:
        TrainingError: not even one worker could be measured.
    """
    timings, problems = list[tuple[Timed, Costs]](), list[str]()
    with timing_processes(run, checkpoint_bytes(model)) as processes:
        for workers in workers_of(run):
            settings = run.finetune.model_copy(update={"processes": workers})
            try:
                found = processes.time_and_cost(settings, window_s=_WINDOW_S, limit_s=_LIMIT_S)
            except TrainingError as error:
                if not timings:
                    raise
                problems.append(f"{counted(workers, 'worker')}: {error}")
                note(problems[-1])
                continue
            timings.append(found)
            note(f"{counted(workers, 'worker')}: {figure(found[0].step_s)} s a step")
    price = run.finetune.price_per_hour
    return report_of(
        timings, batch_size=run.finetune.batch_size, price_per_hour=price, problems=problems
    )
