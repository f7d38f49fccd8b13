"""Metrics: the quality of a model's outputs as one number over a whole data set."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fedcore.errors import TaskError

LARGEST_METRIC = 1e18
"""Bound on the magnitude of any metric: weighted means of such values cannot overflow."""


@dataclass(frozen=True)
class Metric:
    """A named number computed from all outputs and targets of a data set.

    The first metric of a task is its primary one: it decides gates, the best round and the
    released candidate.

    Example::

        def bias(outputs, targets):
            return (outputs - targets).mean().abs().item()

        task = fedcore.Task(..., metrics=(fedcore.RMSE, fedcore.Metric("bias", bias, False)))
    """

    name: str
    compute: Callable[[Tensor, Tensor], float]
    """Computes the value from outputs ``(N, ...)`` and targets ``(N, ...)``, both on the CPU."""
    higher_is_better: bool
    low: float = -LARGEST_METRIC
    """The smallest possible value. A client's reply below it is rejected."""
    high: float = LARGEST_METRIC
    """The largest possible value. A client's reply above it is rejected."""

    def __post_init__(self) -> None:
        if not -LARGEST_METRIC <= self.low < self.high <= LARGEST_METRIC:
            raise TaskError(
                f"metric {self.name!r}: its range is {self.low:g} to {self.high:g}, expected low "
                f"below high, both within {LARGEST_METRIC:g} of zero. Nothing was run; correct "
                "the task file."
            )

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


def _accuracy(outputs: Tensor, targets: Tensor) -> float:
    return (outputs.argmax(dim=-1) == targets).double().mean().item()


def _squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs.reshape(len(outputs), -1) - targets.reshape(len(targets), -1)).double().square()


def _rmse(outputs: Tensor, targets: Tensor) -> float:
    return _squared_error(outputs, targets).mean().sqrt().item()


def _mae(outputs: Tensor, targets: Tensor) -> float:
    return _squared_error(outputs, targets).sqrt().mean().item()


def _perplexity(outputs: Tensor, targets: Tensor) -> float:
    loss = torch.nn.functional.cross_entropy(outputs.flatten(0, -2), targets.flatten())
    return loss.double().exp().item()


ACCURACY = Metric("accuracy", _accuracy, higher_is_better=True, low=0.0, high=1.0)
"""The share of rows (or tokens) whose largest output is the target."""
RMSE = Metric("rmse", _rmse, higher_is_better=False, low=0.0)
"""The square root of the mean squared error, over all outputs."""
MAE = Metric("mae", _mae, higher_is_better=False, low=0.0)
"""The mean absolute error, over all outputs."""
PERPLEXITY = Metric("perplexity", _perplexity, higher_is_better=False, low=0.0)
"""The exponential of the mean cross-entropy over tokens."""
