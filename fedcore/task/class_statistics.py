"""Counts over examples with class targets: decisions, confusions, and histograms of scores.

A target is one class number per place. ``axis`` names the dimension of the outputs that holds the
classes: -1 (``(B, C)`` or ``(B, T, C)``) or 1 (``(B, C, H, W)``). With ``axis=None`` each output is
the logit of one yes-or-no decision, and targets are 0 or 1 in the outputs' shape.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fedcore.task.statistics import Shape, Statistics


@dataclass(frozen=True)
class Decisions:
    """How outputs and targets of a batch become one row per decision."""

    axis: int | None = -1
    """Dimension of the outputs ``(B, ...)`` that holds the classes; None for logits of yes or no,
    ``(B, ...)`` or ``(B, ..., 1)``. Outputs ``(B,)`` and ``(B, 1)`` are such logits in any case."""
    ignored: int | None = None
    """Target that counts for nothing, besides negative ones; None for no other."""

    def scores(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Returns outputs ``(M, C)`` and targets ``(M,)`` of the decisions that count.

        Logits of yes or no become the two columns ``-logit`` and ``logit``, each halved.

        Raises:
            ValueError: the shapes do not belong together, or a target is no class of the outputs.
        """
        if self.axis is None or self._are_logits(outputs.shape[1:]):
            flat = outputs.reshape(-1)
            rows = torch.stack([-flat, flat], dim=1) / 2
            fits = outputs.numel() == targets.numel()
        else:
            moved = outputs.movedim(self.axis, -1)
            rows, fits = moved.reshape(-1, moved.shape[-1]), moved.shape[:-1] == targets.shape
        if not fits:
            raise ValueError(
                f"outputs of shape {tuple(outputs.shape)} do not belong to targets of shape "
                f"{tuple(targets.shape)}"
            )
        true = targets.reshape(-1).long()
        counts = (true >= 0) & (true != self.ignored)
        if not bool(counts.all()):
            rows, true = rows[counts], true[counts]
        if len(true) and int(true.max()) >= rows.shape[1]:
            raise ValueError(f"target {int(true.max())} is none of {rows.shape[1]} classes")
        return rows, true

    def classes(self, shape: Shape) -> int:
        """Returns the number of classes for outputs of ``shape``, without the batch dimension."""
        if self.axis is None or self._are_logits(shape):
            return 2
        return shape[self.axis if self.axis < 0 else self.axis - 1]

    def places(self, shape: Shape) -> int:
        """Returns the number of decisions in outputs of ``shape``, without the batch dimension."""
        return math.prod(shape) // (1 if self._are_logits(shape) else self.classes(shape))

    def _are_logits(self, shape: Shape) -> bool:
        """Returns whether outputs of this shape, without the batch, are logits of yes or no."""
        return self.axis is None or tuple(shape) in ((), (1,))


ROWS = Decisions()
"""Classes in the last dimension."""


def hit_statistics(
    hits: Callable[[Tensor, Tensor], Tensor], decisions: Decisions = ROWS
) -> Statistics:
    """Returns the share of decisions for which ``hits(scores, targets)`` is true."""

    def sums(outputs: Tensor, targets: Tensor) -> Tensor:
        scores, true = decisions.scores(outputs, targets)
        right = hits(scores, true).double().sum()
        return torch.stack([right, len(true) - right])

    def limits(shape: Shape) -> list[tuple[float, float]]:
        return [(0.0, decisions.places(shape))] * 2

    value = lambda sums: sums[0] / sums.sum()  # noqa: E731
    return Statistics(sums, value, limits, total=decisions.places, is_share=True)


def accuracy_statistics(decisions: Decisions = ROWS) -> Statistics:
    """Returns the share of decisions whose largest output is the target's."""
    return hit_statistics(lambda scores, true: scores.argmax(dim=-1) == true, decisions)


def confusion_counts(outputs: Tensor, targets: Tensor, decisions: Decisions = ROWS) -> Tensor:
    """Returns how often each class was taken for each, shape ``(C, C)``, float64.

    Rows are the targets, columns the decisions.
    """
    scores, true = decisions.scores(outputs, targets)
    classes = scores.shape[1]
    cells = true * classes + scores.argmax(dim=-1)
    return torch.bincount(cells, minlength=classes**2).reshape(classes, classes).double()


def confusion_statistics(
    value: Callable[[Tensor], float | Tensor], decisions: Decisions = ROWS
) -> Statistics:
    """Returns statistics whose value is a function of the confusion matrix ``(C, C)``."""

    def square(sums: Tensor) -> float | Tensor:
        classes = math.isqrt(len(sums))
        return value(sums.reshape(classes, classes))

    return Statistics(
        lambda outputs, targets: confusion_counts(outputs, targets, decisions).flatten(),
        square,
        lambda shape: [(0.0, decisions.places(shape))] * decisions.classes(shape) ** 2,
        total=decisions.places,
    )


@dataclass(frozen=True)
class ClassCounts:
    """Decisions by class: each field has shape ``(C,)``, float64."""

    hits: Tensor
    """Decisions for the class that were right."""
    false: Tensor
    """Decisions for the class that were wrong."""
    missed: Tensor
    """Targets of the class for which another was decided."""


def class_statistics(
    value: Callable[[ClassCounts], float | Tensor], decisions: Decisions = ROWS
) -> Statistics:
    """Returns statistics whose value is a function of the counts by class: three sums a class."""

    def sums(outputs: Tensor, targets: Tensor) -> Tensor:
        scores, true = decisions.scores(outputs, targets)
        decided, classes = scores.argmax(dim=-1), scores.shape[1]
        right = decided == true
        of = (decided[right], decided[~right], true[~right])
        return torch.cat([torch.bincount(each, minlength=classes) for each in of]).double()

    def counted(sums: Tensor) -> float | Tensor:
        return value(ClassCounts(*sums.reshape(3, -1)))

    return Statistics(
        sums,
        counted,
        lambda shape: [(0.0, decisions.places(shape))] * (3 * decisions.classes(shape)),
        total=lambda shape: 2 * decisions.places(shape),  # a wrong one is false once, missed once
    )


def auc_statistics(bins: int, decisions: Decisions = ROWS) -> Statistics:
    """Returns the area under the ROC curve from histograms of both classes' scores.

    The score of a row is the difference of its two outputs, which is the logit where outputs are
    logits. It falls into one of ``bins`` bins of equal width on the scale ``z / (1 + |z|)``. Two
    scores in one bin count as equal, so the result differs from that of the scores themselves by at
    most half the share of pairs (one example of each class) whose scores share a bin.
    """

    def sums(outputs: Tensor, targets: Tensor) -> Tensor:
        scores, true = decisions.scores(outputs, targets)
        if scores.shape[1] != 2:
            raise ValueError(f"it needs 2 classes, and the outputs have {scores.shape[1]}")
        logit = (scores[:, 1] - scores[:, 0]).double()
        if not bool(logit.isfinite().all()):
            raise ValueError("outputs are not finite")
        place = ((logit / (1 + logit.abs()) + 1) * (bins / 2)).long().clamp(0, bins - 1)
        return torch.bincount(true * bins + place, minlength=2 * bins).double()

    def limits(shape: Shape) -> list[tuple[float, float]]:
        return [(0.0, decisions.places(shape))] * (2 * bins)

    return Statistics(sums, area_under_curve, limits, total=decisions.places)


def area_under_curve(sums: Tensor) -> float:
    """Returns the area from two histograms, negatives first, shape ``(2 * bins,)``.

    Raises:
        ValueError: one class has no examples.
    """
    negative, positive = sums.double().reshape(2, -1)
    pairs = float(negative.sum() * positive.sum())
    if not pairs:
        raise ValueError("one class only")
    below = negative.cumsum(0) - negative
    return float((positive * (below + negative / 2)).sum()) / pairs


def area_resolution(sums: Tensor) -> float:
    """Returns how far `area_under_curve` may be from the area of the scores themselves."""
    negative, positive = sums.double().reshape(2, -1)
    pairs = float(negative.sum() * positive.sum())
    return float((positive * negative).sum()) / (2 * pairs) if pairs else 0.0
