"""From runs to rows and checks: medians, ranges, ratios within a repeat."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Run:
    """One measured run of one system."""

    system: str
    workload: str
    repeat: int
    seconds_per_round: float
    clients_per_s: float
    start_up_s: float
    """From the launch of the process until its first round is done."""
    peak_bytes: int
    """PSS of all its processes until its last round is done."""
    bytes_per_round: int | None
    accuracy: float
    epsilon: float | None
    epsilon_max: float | None


@dataclass(frozen=True, kw_only=True)
class Row:
    """One metric of one system on one workload, over repeats."""

    system: str
    workload: str
    metric: str
    unit: str
    median: float
    min: float
    max: float
    repeats: int


@dataclass(frozen=True, kw_only=True)
class Check:
    """A figure that is promised: ``value`` must be at least, or at most, ``bound``."""

    name: str
    value: float
    bound: float
    holds: bool
    min: float
    max: float
    """The range over repeats that ``value`` is the median of; ``value`` itself where it is one."""


METRICS = {
    "seconds_per_round": "s",
    "clients_per_s": "1/s",
    "start_up_s": "s",
    "peak_bytes": "bytes",
    "bytes_per_round": "bytes",
    "accuracy": "fraction",
    "epsilon": "epsilon",
    "epsilon_max": "epsilon",
}


def row(system: str, workload: str, metric: str, unit: str, values: Sequence[float]) -> Row:
    """A row over repeats."""
    return Row(
        system=system,
        workload=workload,
        metric=metric,
        unit=unit,
        median=statistics.median(values),
        min=min(values),
        max=max(values),
        repeats=len(values),
    )


def rows_of(runs: Sequence[Run]) -> list[Row]:
    """Every metric of every system on every workload, in the order of the runs."""
    rows = []
    for workload, system in dict.fromkeys((run.workload, run.system) for run in runs):
        mine = [run for run in runs if (run.workload, run.system) == (workload, system)]
        for metric, unit in METRICS.items():
            values = [getattr(run, metric) for run in mine]
            known = [value for value in values if value is not None]
            if known:
                rows.append(row(system, workload, metric, unit, known))
    return rows


def ratios(runs: Sequence[Run], workload: str, slow: str, fast: str) -> list[float]:
    """How many times as long a round takes ``slow`` as ``fast``, within each repeat.

    Runs of one repeat stand minutes apart at most, so a machine that is slower for a while slows
    both.
    """
    seconds: dict[str, Mapping[int, float]] = {
        system: {
            run.repeat: run.seconds_per_round
            for run in runs
            if (run.workload, run.system) == (workload, system)
        }
        for system in (slow, fast)
    }
    both = sorted(seconds[slow].keys() & seconds[fast].keys())
    return [seconds[slow][repeat] / seconds[fast][repeat] for repeat in both]


def at_least(name: str, values: Sequence[float], bound: float) -> Check:
    """Checks that the median of ``values`` reaches ``bound``."""
    value = statistics.median(values)
    return Check(
        name=name, value=value, bound=bound, holds=value >= bound, min=min(values), max=max(values)
    )


def at_most(name: str, values: Sequence[float], bound: float) -> Check:
    """Checks that the median of ``values`` does not pass ``bound``."""
    value = statistics.median(values)
    return Check(
        name=name, value=value, bound=bound, holds=value <= bound, min=min(values), max=max(values)
    )


def no_less_accurate(
    name: str, ours: Sequence[float], theirs: Sequence[float], *, deviations: float = 1.0
) -> Check:
    """Checks that our mean accuracy is at most one standard deviation below theirs.

    The value is the difference of means in units of the standard deviation of ``theirs`` over
    seeds (with n - 1); at least two seeds of each are needed.
    """
    spread = statistics.stdev(theirs)
    gap = statistics.fmean(ours) - statistics.fmean(theirs)
    value = gap / spread if spread else math.copysign(math.inf, gap) if gap else 0.0
    value = max(-1e9, min(1e9, value))  # JSON knows no infinity
    return Check(
        name=name,
        value=value,
        bound=-deviations,
        holds=value >= -deviations,
        min=value,
        max=value,
    )


def slope(times: Sequence[float], values: Sequence[float]) -> float:
    """The least-squares slope of ``values`` over ``times``."""
    return statistics.linear_regression(times, values).slope
