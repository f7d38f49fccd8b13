"""Sums over examples from which a metric's value over any union of data sets follows."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fedcore.errors import TaskError

if TYPE_CHECKING:  # a server accepts connections before torch, which takes seconds, is imported
    from torch import Tensor

Shape = tuple[int, ...]
Limits = Sequence[tuple[float, float]]
FloatVector = NDArray[np.float64]

MAX_SUMS = 65_536
"""Most sums of all metrics of a task: 512 KiB in a client's reply."""


@dataclass(frozen=True)
class SumLimits:
    """What one example can add to sums, resolved for a model's outputs."""

    low: FloatVector = field(repr=False)
    """Smallest contribution to each sum, shape ``(K,)``."""
    high: FloatVector = field(repr=False)
    """Largest contribution to each sum, shape ``(K,)``."""
    total: float
    """Largest contribution to all sums together, by magnitude; infinite if nothing limits it."""
    noise: FloatVector | None = field(default=None, repr=False)
    """Standard deviation of the noise on each sum, shape ``(K,)``; None for exact sums."""

    @property
    def bounded(self) -> bool:
        """Whether one example can move no sum by more than a known amount."""
        return math.isfinite(self.total) or bool(np.isfinite([self.low, self.high]).all())


@dataclass(frozen=True)
class Statistics:
    """A metric as a function of sums over examples.

    Sums of several clients add up to those of all their examples, so a metric of this form has the
    value over all clients' examples that one data set of them would have. An object is callable as
    a metric's ``compute``.

    Example::

        def sums(outputs, targets):
            return torch.stack([(outputs - targets).abs().sum(), targets.abs().sum()])

        relative = fedcore.Statistics(sums, lambda s: s[0] / s[1], limits=[(0, math.inf)] * 2)
        fedcore.Metric("relative_error", relative, higher_is_better=False, low=0.0)
    """

    sums: Callable[[Tensor, Tensor], Tensor]
    """Returns the sums over a batch, shape ``(K,)``, from outputs ``(B, ...)`` and targets
    ``(B, ...)``, both on the CPU."""
    value: Callable[[Tensor], float | Tensor]
    """Returns the metric from sums, shape ``(K,)``, float64. NaN or a ``ValueError`` means that it
    is undefined; the error's text is the reason."""
    limits: Limits | Callable[[Shape], Limits] = field(hash=False)
    """The smallest and largest amount that one example adds to each sum, ``(low, high)`` each; or a
    function that returns them for the shape of one example's outputs. Their number is ``K``. A
    client whose sums are not within them, times its number of examples, is rejected. Where a limit
    is infinite, clients whose sums per example are far from all others' are left out: give finite
    limits where you can."""
    total: float | Callable[[Shape], float] = math.inf
    """The most that one example adds to all sums together, by magnitude, or a function that returns
    it for the shape of one example's outputs. For counts of disjoint cases it is 1."""
    is_share: bool = False
    """Whether the two sums count right and wrong decisions, and the value is the share of right
    ones: its interval over examples is then known exactly."""

    def __call__(self, outputs: Tensor, targets: Tensor) -> float:
        """Computes the metric over all examples of a data set.

        Raises:
            ValueError: it is undefined on these data.
        """
        return self.value_of(self.sums_of(outputs, targets).numpy())

    def sums_of(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Returns the sums as a float64 vector.

        Raises:
            ValueError: they are not one-dimensional.
        """
        import torch

        found = torch.as_tensor(self.sums(outputs, targets)).detach().to("cpu", torch.float64)
        if found.dim() != 1:
            raise ValueError(f"its sums have shape {tuple(found.shape)}, expected (K,)")
        return found

    def value_of(self, sums: FloatVector) -> float:
        """Returns the metric from sums; NaN where it is undefined, if not an error."""
        import torch

        return number_of(self.value(torch.tensor(sums, dtype=torch.float64)))

    def limits_for(self, shape: Shape, *, name: str) -> SumLimits:
        """Returns the limits for outputs of ``shape``, without the batch dimension.

        Raises:
            TaskError: they are no pairs of a low and a high number, or too many.
        """
        try:
            given = self.limits(shape) if callable(self.limits) else self.limits
            pairs = np.asarray(given, np.float64)
            total = float(self.total(shape) if callable(self.total) else self.total)
            if pairs.ndim != 2 or pairs.shape[1] != 2 or not 0 < len(pairs) <= MAX_SUMS:
                raise ValueError(f"limits of shape {pairs.shape}")
            if not (pairs[:, 0] <= pairs[:, 1]).all() or not total > 0:
                raise ValueError("a low limit above the high one, or a total that is not positive")
        except (Exception, SystemExit) as error:  # the task's code may raise anything
            raise TaskError(
                f"metric {name!r}: its limits for outputs of shape {shape} are not usable "
                f"({type(error).__name__}: {error}), expected 1 to {MAX_SUMS} pairs (low, high). "
                "Nothing was run; correct the metric's Statistics."
            ) from error
        return SumLimits(pairs[:, 0].copy(), pairs[:, 1].copy(), total)


def number_of(value: object) -> float:
    """Returns what a metric computed as a float: a number, or a tensor or array of one element.

    Raises:
        TypeError: it is no number.
    """
    if isinstance(value, str | bytes) or value is None or isinstance(value, complex):
        raise TypeError(f"it returned {str(value)[:40]!r} ({type(value).__name__}), not a number")
    import torch

    if isinstance(value, torch.Tensor | np.ndarray):
        if math.prod(value.shape) != 1:
            raise TypeError(f"it returned an array of shape {tuple(value.shape)}, not a number")
        value = value.item()
    return float(value)  # type: ignore[arg-type]


def exact_sum(rows: Sequence[FloatVector]) -> FloatVector:
    """Returns the sum of vectors of one length, rounded once: it does not depend on their order.

    Args:
        rows: At least one vector, finite.
    """
    table = np.stack(rows)
    if _fits_in_integers(table):  # counts: float64 adds them without rounding
        total: FloatVector = table.sum(axis=0)
        return total
    return np.array([math.fsum(column) for column in table.T])


def _fits_in_integers(table: FloatVector) -> bool:
    whole = bool((table == np.rint(table)).all())
    return whole and float(np.abs(table).max(initial=0.0)) * len(table) < 2.0**53
