"""Metrics over what counts: positions that are not ignored, with classes on the last axis."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from fedcore.task.kinds.protocol import TargetOptions
from fedcore.task.metrics import ACCURACY, Metric

Scored = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Maps outputs and targets of a data set to the rows that a metric compares."""


def over(scored: Scored, *metrics: Metric) -> tuple[Metric, ...]:
    """Returns metrics computed on what ``scored`` makes of outputs and targets."""
    return tuple(replace(one, compute=_composed(one, scored)) for one in metrics)


def _composed(metric: Metric, scored: Scored) -> Callable[[Tensor, Tensor], float]:
    return lambda outputs, targets: metric.compute(*scored(outputs, targets))


def positions(options: TargetOptions, *, axis: int) -> Scored:
    """Returns outputs as ``(M, C)`` and targets as ``(M,)``, without ignored positions.

    Args:
        options: Names the ignored value.
        axis: The axis of classes, 1 or -1.
    """

    def scored(outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        rows, flat = outputs.movedim(axis, -1).flatten(0, -2), targets.flatten()
        if options.ignore_index is None:
            return rows, flat
        kept = flat != options.ignore_index
        return rows[kept], flat[kept]

    return scored


def _overlaps(outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns by class how often it was decided and true, decided, and true, each ``(C,)``."""
    classes, decided = outputs.shape[-1], outputs.argmax(dim=-1)
    both = torch.bincount(targets[decided == targets], minlength=classes).double()
    return (
        both,
        torch.bincount(decided, minlength=classes).double(),
        torch.bincount(targets, minlength=classes).double(),
    )


def _mean_iou(outputs: Tensor, targets: Tensor) -> float:
    both, decided, true = _overlaps(outputs, targets)
    union = decided + true - both
    return (both / union)[union > 0].mean().item()


def _dice(outputs: Tensor, targets: Tensor) -> float:
    both, decided, true = _overlaps(outputs, targets)
    total = decided + true
    return (2 * both / total)[total > 0].mean().item()


MEAN_IOU = Metric("mean_iou", _mean_iou, higher_is_better=True, low=0.0, high=1.0)
"""Intersection over union of decided and true positions, averaged over the classes that occur."""
DICE = Metric("dice", _dice, higher_is_better=True, low=0.0, high=1.0)
"""Dice coefficient of decided and true positions, averaged over the classes that occur."""
PIXEL_ACCURACY = replace(ACCURACY, name="pixel_accuracy")
"""The share of positions whose class is right."""
LABEL_ACCURACY = replace(ACCURACY, name="label_accuracy")
"""The share of right decisions over all labels."""


def two_classes(options: TargetOptions) -> Scored:
    """Returns logits of both classes ``(M, 2)``, and class numbers ``(M,)``, of yes-or-no targets.

    The targets have the outputs' shape, and one logit each.
    """

    def scored(outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        logits, flat = outputs.flatten(), targets.flatten()
        if options.ignore_index is not None:
            kept = flat != options.ignore_index
            logits, flat = logits[kept], flat[kept]
        return torch.stack([torch.zeros_like(logits), logits], dim=1), flat.long()

    return scored
