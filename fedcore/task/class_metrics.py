"""Metrics of decisions between classes: each is pooled over clients from counts.

``axis`` says where the outputs have the classes: -1 for ``(B, C)`` and ``(B, T, C)``, 1 for
``(B, C, H, W)``, None for one logit per yes-or-no target. Negative targets, and those equal to
``ignored``, count for nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from fedcore.errors import TaskError
from fedcore.task.class_statistics import (
    ClassCounts,
    Decisions,
    accuracy_statistics,
    auc_statistics,
    class_statistics,
    confusion_statistics,
    hit_statistics,
)
from fedcore.task.metrics import LARGEST_METRIC, Metric
from fedcore.task.statistics import MAX_SUMS, Statistics

Average = Literal["macro", "binary"]
"""``macro``: the mean over the classes that occur, in targets or decisions. ``binary``: class 1."""
AUC_BINS = 2048
"""Bins of the default AUC: near a logit of 0 they are 0.001 wide, near 10 they are 0.12."""


def accuracy(
    *, axis: int | None = -1, ignored: int | None = None, name: str = "accuracy"
) -> Metric:
    """Returns the share of decisions that are right."""
    return _share(name, accuracy_statistics(Decisions(axis, ignored)))


def top_k(
    k: int, *, axis: int | None = -1, ignored: int | None = None, name: str | None = None
) -> Metric:
    """Returns the share of decisions whose target is among the ``k`` largest outputs.

    Raises:
        TaskError: ``k`` is not positive.
    """
    if k < 1:
        raise TaskError(f"top_k({k}): expected k of at least 1. Nothing was run; raise k.")

    def hits(scores: Tensor, true: Tensor) -> Tensor:
        best = scores.topk(min(k, scores.shape[1]), dim=-1).indices
        return (best == true[:, None]).any(dim=-1)

    return _share(name or f"top_{k}_accuracy", hit_statistics(hits, Decisions(axis, ignored)))


def precision(
    average: Average = "macro",
    *,
    axis: int | None = -1,
    ignored: int | None = None,
    name: str = "precision",
) -> Metric:
    """Returns the share of decisions for a class that are right."""
    return _by_class(name, average, axis, ignored, lambda c: (c.hits, c.hits + c.false))


def recall(
    average: Average = "macro",
    *,
    axis: int | None = -1,
    ignored: int | None = None,
    name: str = "recall",
) -> Metric:
    """Returns the share of a class's targets that were decided right."""
    return _by_class(name, average, axis, ignored, lambda c: (c.hits, c.hits + c.missed))


def f1(
    average: Average = "macro",
    *,
    axis: int | None = -1,
    ignored: int | None = None,
    name: str = "f1",
) -> Metric:
    """Returns the harmonic mean of precision and recall."""
    return _by_class(
        name, average, axis, ignored, lambda c: (2 * c.hits, 2 * c.hits + c.false + c.missed)
    )


def mean_iou(*, axis: int | None = 1, ignored: int | None = None, name: str = "mean_iou") -> Metric:
    """Returns the mean over classes of intersection over union, of all examples together."""
    return _by_class(name, "macro", axis, ignored, lambda c: (c.hits, c.hits + c.false + c.missed))


def dice(*, axis: int | None = 1, ignored: int | None = None, name: str = "dice") -> Metric:
    """Returns the mean over classes of the Dice coefficient, of all examples together."""
    return f1("macro", axis=axis, ignored=ignored, name=name)


def auc(
    bins: int = AUC_BINS, *, axis: int | None = -1, ignored: int | None = None, name: str = "auc"
) -> Metric:
    """Returns the area under the ROC curve of two classes, from histograms of ``bins`` bins.

    It differs from the area that the scores themselves have by at most half the share of pairs (one
    example of each class) in one bin; see `fedcore.task.class_statistics.auc_statistics`.

    Raises:
        TaskError: there are fewer than 2 bins, or more than a reply can hold.
    """
    if not 2 <= bins <= MAX_SUMS // 2:
        raise TaskError(
            f"auc({bins}): expected 2 to {MAX_SUMS // 2} bins. Nothing was run; correct the task "
            "file."
        )
    return _share(name, auc_statistics(bins, Decisions(axis, ignored)))


def from_confusion(
    name: str,
    value: Callable[[Tensor], float | Tensor],
    *,
    higher_is_better: bool = True,
    axis: int | None = -1,
    ignored: int | None = None,
    low: float = -LARGEST_METRIC,
    high: float = LARGEST_METRIC,
) -> Metric:
    """Returns a metric that is a function of the confusion matrix of all examples.

    Example::

        def kappa(counts):  # (C, C): rows are targets, columns decisions
            n = counts.sum()
            chance = (counts.sum(0) * counts.sum(1)).sum() / n**2
            return (counts.trace() / n - chance) / (1 - chance)

        fedcore.metrics.from_confusion("kappa", kappa, low=-1.0, high=1.0)
    """
    statistics = confusion_statistics(value, Decisions(axis, ignored))
    return Metric(name, statistics, higher_is_better, low, high)


Ratio = Callable[[ClassCounts], tuple[Tensor, Tensor]]


def _by_class(
    name: str, average: Average, axis: int | None, ignored: int | None, ratio: Ratio
) -> Metric:
    def macro(counts: ClassCounts) -> Tensor:
        part, whole = ratio(counts)
        occurs = counts.hits + counts.false + counts.missed > 0
        if not bool(occurs.any()):
            raise ValueError("no target counts")
        return torch.where(whole > 0, part / whole.clamp(min=1), 0.0)[occurs].mean()

    def binary(counts: ClassCounts) -> Tensor:
        part, whole = ratio(counts)
        if len(whole) != 2:
            raise ValueError(f"average 'binary' needs 2 classes, and there are {len(whole)}")
        if not float(whole[1]):
            raise ValueError("class 1 does not occur")
        return part[1] / whole[1]

    if average not in ("macro", "binary"):
        raise TaskError(
            f"metric {name!r}: average = {average!r}, expected 'macro' or 'binary'. Nothing was "
            "run; correct the task file."
        )
    value = binary if average == "binary" else macro
    return _share(name, class_statistics(value, Decisions(axis, ignored)))


def _share(name: str, statistics: Statistics) -> Metric:
    return Metric(name, statistics, higher_is_better=True, low=0.0, high=1.0)


AUC = auc()
"""The area under the ROC curve of two classes."""
F1 = f1()
"""The mean over classes of F1; ``fedcore.metrics.f1("binary")`` for that of class 1."""
PRECISION = precision()
"""The mean over classes of the share of decisions for a class that are right."""
RECALL = recall()
"""The mean over classes of the share of a class's targets that were decided right."""
MEAN_IOU = mean_iou()
"""The mean over classes of intersection over union, for outputs ``(B, C, ...)``."""
DICE = dice()
"""The mean over classes of the Dice coefficient, for outputs ``(B, C, ...)``."""
