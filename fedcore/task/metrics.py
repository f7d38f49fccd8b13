"""Metrics: the quality of a model's outputs as one number over a whole data set.

`Metric` is the type, with the metrics of regression and of tokens; those of classes are in
`fedcore.task.class_metrics`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from fedcore.errors import TaskError
from fedcore.task.class_statistics import accuracy_statistics
from fedcore.task.statistics import Shape, Statistics

LARGEST_METRIC = 1e18
"""Bound on the magnitude of any metric: weighted means of such values cannot overflow."""
_MAX_NAME = 100  # characters; a reply's entries have at most 128
_RESERVED = frozenset({"num-examples", "sums"})  # names of other entries of a reply


@dataclass(frozen=True)
class Metric:
    """A named number computed from all outputs and targets of a data set.

    The first metric of a task is its primary one: it decides gates, the best round and the
    released candidate.

    Over clients, a metric that is computed from `fedcore.Statistics` has the value over all of
    their examples. One that is any other function is the mean of the clients' values, weighted by
    their examples, and is reported as a "mean of clients".

    Example::

        def bias(outputs, targets):
            return (outputs - targets).mean().abs().item()

        task = fedcore.Task(..., metrics=(fedcore.RMSE, fedcore.Metric("bias", bias, False)))
    """

    name: str
    compute: Callable[[Tensor, Tensor], float]
    """Computes the value from outputs ``(N, ...)`` and targets ``(N, ...)``, both on the CPU: a
    `fedcore.Statistics` or any other function. Where it raises or returns NaN or infinity, the
    metric is undefined on these data."""
    higher_is_better: bool
    low: float = -LARGEST_METRIC
    """The smallest possible value. A client's reply below it is rejected."""
    high: float = LARGEST_METRIC
    """The largest possible value. A client's reply above it is rejected."""

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name.isprintable():
            raise TaskError(
                f"metric {self.name!r}: expected a name of printable characters. Nothing was run; "
                "correct the task file."
            )
        if not 0 < len(self.name) <= _MAX_NAME or self.name in _RESERVED:
            raise TaskError(
                f"metric {self.name[:_MAX_NAME]!r}: its name has {len(self.name)} characters or is "
                f"reserved, expected 1 to {_MAX_NAME} and none of {', '.join(sorted(_RESERVED))}. "
                "Nothing was run; rename the metric in the task file."
            )
        if not callable(self.compute):
            raise TaskError(
                f"metric {self.name!r}: its compute is a {type(self.compute).__name__}, expected a "
                "function of outputs and targets, or a fedcore.Statistics. Nothing was run; "
                "correct the task file."
            )
        if not -LARGEST_METRIC <= self.low < self.high <= LARGEST_METRIC:
            raise TaskError(
                f"metric {self.name!r}: its range is {self.low:g} to {self.high:g}, expected low "
                f"below high, both within {LARGEST_METRIC:g} of zero. Nothing was run; correct "
                "the task file."
            )

    @property
    def statistics(self) -> Statistics | None:
        """The sums that the metric is computed from; None for any other function."""
        return self.compute if isinstance(self.compute, Statistics) else None

    @property
    def has_range(self) -> bool:
        """Whether the metric's values are bounded by its declaration."""
        return self.high - self.low < LARGEST_METRIC

    def worsening(self, before: float, after: float) -> float:
        """Returns how much worse ``after`` is than ``before``; negative if it is better.

        Where higher is better it is the absolute drop (an accuracy from 0.90 to 0.88 gives 0.02);
        for an error it is the rise as a fraction of ``before``.
        """
        if self.higher_is_better:
            return before - after
        return (after - before) / abs(before) if before else after

    def better(self, one: float, other: float) -> bool:
        """Returns whether ``one`` is strictly better than ``other``."""
        return one > other if self.higher_is_better else one < other


def check_metrics(metrics: Sequence[Metric], *, task: str) -> None:
    """Checks that a task's metrics can be told apart.

    Raises:
        TaskError: one is no `Metric`, or two have the same name.
    """
    for each in metrics:
        if not isinstance(each, Metric):
            raise TaskError(
                f"task {task!r}: its metrics contain a {type(each).__name__}, expected "
                "fedcore.Metric objects. Nothing was run; correct the task file."
            )
    names = [each.name for each in metrics]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise TaskError(
            f"task {task!r}: {len(twice)} of its metrics' names are used twice ({twice[0]!r}). A "
            "result could belong to either. Nothing was run; give each metric its own name."
        )


def _values(shape: Shape) -> int:
    return math.prod(shape)


def _places(shape: Shape) -> int:
    return math.prod(shape[:-1])


def _errors(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs.reshape(len(outputs), -1) - targets.reshape(len(targets), -1)).double()


def _squared(outputs: Tensor, targets: Tensor) -> Tensor:
    found = _errors(outputs, targets)
    return torch.stack([found.square().sum(), torch.tensor(float(found.numel()))])


def _absolute(outputs: Tensor, targets: Tensor) -> Tensor:
    found = _errors(outputs, targets)
    return torch.stack([found.abs().sum(), torch.tensor(float(found.numel()))])


def _token_loss(outputs: Tensor, targets: Tensor, *, ignored: int) -> Tensor:
    flat = targets.flatten()
    loss = torch.nn.functional.cross_entropy(
        outputs.flatten(0, -2), flat, ignore_index=ignored, reduction="none"
    )
    return torch.stack([loss.double().sum(), (flat != ignored).double().sum()])


def _mean(sums: Tensor) -> Tensor:
    return sums[0] / sums[1]


_IGNORED = -100  # target that torch's losses leave out by default
_LARGEST_LOSS = math.log(LARGEST_METRIC)  # of one token; a larger mean has no perplexity in range
_SQUARED = Statistics(
    _squared,
    lambda sums: _mean(sums).sqrt(),
    lambda shape: [(0.0, LARGEST_METRIC**2 * _values(shape)), (0.0, _values(shape))],
)
_ABSOLUTE = Statistics(
    _absolute, _mean, lambda shape: [(0.0, LARGEST_METRIC * _values(shape)), (0.0, _values(shape))]
)


def perplexity(*, ignored: int | None = None, name: str = "perplexity") -> Metric:
    """Returns the exponential of the mean cross-entropy over tokens.

    Args:
        ignored: Target that counts for nothing; -100 when None.
        name: Name of the metric.
    """
    statistics = Statistics(
        partial(_token_loss, ignored=_IGNORED if ignored is None else ignored),
        lambda sums: _mean(sums).exp(),
        lambda shape: [(0.0, _LARGEST_LOSS * _places(shape)), (0.0, _places(shape))],
    )
    return Metric(name, statistics, higher_is_better=False, low=0.0)


ACCURACY = Metric("accuracy", accuracy_statistics(), higher_is_better=True, low=0.0, high=1.0)
"""The share of rows (or tokens) whose largest output is the target."""
RMSE = Metric("rmse", _SQUARED, higher_is_better=False, low=0.0)
"""The square root of the mean squared error, over all outputs."""
MAE = Metric("mae", _ABSOLUTE, higher_is_better=False, low=0.0)
"""The mean absolute error, over all outputs."""
PERPLEXITY = perplexity()
"""The exponential of the mean cross-entropy over tokens."""
