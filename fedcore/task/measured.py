"""What a task's metrics are on one data set: sums, values, and the metrics that are undefined.

`Measuring` takes a model's outputs batch by batch; `Measured` is the result, for a client's reply
or for its `scores`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fedcore.errors import InsufficientMemory
from fedcore.observability.foreign import foreign
from fedcore.task.metrics import Metric
from fedcore.task.statistics import FloatVector, number_of

_MAX_REASON = 200  # characters
_ROUNDING = 1e-9  # relative: a mean of numbers up to 1 may exceed 1 by its last bit


@dataclass(frozen=True)
class Measured:
    """The metrics of one data set. A metric is in exactly one of the three mappings."""

    examples: int
    sums: Mapping[str, FloatVector] = field(default_factory=dict)
    """Sums by metric, for metrics with `fedcore.Statistics`."""
    values: Mapping[str, float] = field(default_factory=dict)
    """Values by metric, for other metrics: finite, within the metric's range."""
    undefined: Mapping[str, str] = field(default_factory=dict)
    """Reasons by metric, for metrics without sums or value on these data."""
    faults: frozenset[str] = frozenset()
    """The undefined metrics whose function failed in a way that data hardly explain."""

    def score(self, metric: Metric) -> float:
        """Returns a metric's value; NaN where it is undefined."""
        return self.judged(metric)[0]

    def scores(self, metrics: Iterable[Metric]) -> dict[str, float]:
        """Returns metrics by name; NaN where one is undefined."""
        return {metric.name: self.score(metric) for metric in metrics}

    def judged(self, metric: Metric) -> tuple[float, str]:
        """Returns a metric's value with an empty reason, or NaN with the reason."""
        if metric.name in self.undefined:
            return math.nan, self.undefined[metric.name]
        if metric.name in self.values:
            return self.values[metric.name], ""
        return value_of_sums(metric, self.sums[metric.name])


def value_of_sums(metric: Metric, sums: FloatVector) -> tuple[float, str]:
    """Returns a metric's value with an empty reason, or NaN with the reason."""
    assert metric.statistics is not None
    statistics = metric.statistics
    return _attempt(metric, lambda: statistics.value_of(sums))[:2]


class _Attempt(NamedTuple):
    value: float
    reason: str
    fault: bool = False


def _attempt(metric: Metric, compute: Callable[[], object]) -> _Attempt:
    """Returns what a metric's function computes, or why that is no value of the metric."""
    try:
        value = number_of(compute())
    except (InsufficientMemory, MemoryError, torch.OutOfMemoryError):
        raise
    except (Exception, SystemExit) as error:  # the task's code may raise anything
        return _failed(error)
    if not math.isfinite(value):
        return _Attempt(math.nan, f"it is {value}")
    within = min(max(value, metric.low), metric.high)
    if abs(value - within) > _ROUNDING * max(1.0, abs(within)):
        said = f"{value:.6g} is not within {metric.low:g} to {metric.high:g}"
        return _Attempt(math.nan, said, fault=True)
    return _Attempt(within, "")


def _failed(error: BaseException) -> _Attempt:
    said, of_data = foreign(error, _MAX_REASON), isinstance(error, _OF_DATA)
    said = said.rstrip(".")
    if not (of_data and said):
        said = f"{type(error).__name__}: {said}" if said else type(error).__name__
    return _Attempt(math.nan, foreign(said, _MAX_REASON), fault=not of_data)


_OF_DATA = (ValueError, ArithmeticError)  # what functions raise where a value does not exist


class Measuring:
    """Collects outputs of a model, batch by batch, and computes metrics over all of them.

    Only metrics without `fedcore.Statistics` need all outputs at once; without any, memory does not
    grow with the data. A metric that raises is undefined; the others are unaffected.
    """

    def __init__(self, metrics: Sequence[Metric]) -> None:
        """Starts without examples."""
        self._metrics = metrics
        self._sums: dict[str, Tensor] = {}
        self._undefined: dict[str, _Attempt] = {}
        self._outputs: list[Tensor] = []
        self._targets: list[Tensor] = []
        self._keeps = any(metric.statistics is None for metric in metrics)
        self._examples = 0

    def add(self, outputs: Tensor, targets: Tensor) -> None:
        """Takes in outputs ``(B, ...)`` and targets ``(B, ...)``, both on the CPU."""
        self._examples += len(targets)
        if self._keeps:
            self._outputs.append(outputs)
            self._targets.append(targets)
        for metric in self._metrics:
            if metric.statistics is not None and metric.name not in self._undefined:
                self._add_sums(metric, outputs, targets)

    def _add_sums(self, metric: Metric, outputs: Tensor, targets: Tensor) -> None:
        assert metric.statistics is not None
        try:
            found = metric.statistics.sums_of(outputs, targets)
            known = self._sums.get(metric.name)
            self._sums[metric.name] = found if known is None else known + found
        except (InsufficientMemory, MemoryError, torch.OutOfMemoryError):
            raise
        except (Exception, SystemExit) as error:  # the task's code may raise anything
            self._undefined[metric.name] = _failed(error)

    def result(self) -> Measured:
        """Returns the metrics over all examples."""
        sums: dict[str, FloatVector] = {}
        values: dict[str, float] = {}
        undefined = dict(self._undefined)
        whole = (torch.cat(self._outputs), torch.cat(self._targets)) if self._outputs else None
        for metric in self._metrics:
            if metric.statistics is None and whole is not None:
                found = _attempt(metric, partial(metric.compute, *whole))
                if found.reason:
                    undefined[metric.name] = found
                else:
                    values[metric.name] = found.value
            elif metric.name in self._sums and metric.name not in undefined:
                totals = self._sums[metric.name].numpy()
                if np.isfinite(totals).all():
                    sums[metric.name] = totals
                else:
                    undefined[metric.name] = _Attempt(math.nan, "its sums are not finite")
        return Measured(
            self._examples,
            sums,
            values,
            {name: each.reason for name, each in undefined.items()},
            frozenset(name for name, each in undefined.items() if each.fault),
        )


def measure_outputs(metrics: Sequence[Metric], outputs: Tensor, targets: Tensor) -> Measured:
    """Computes metrics from outputs ``(N, ...)`` and targets ``(N, ...)`` of one data set."""
    measuring = Measuring(metrics)
    measuring.add(outputs, targets)
    return measuring.result()
