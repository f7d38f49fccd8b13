"""Losses with class weights, ignored targets and label smoothing, as means over examples.

torch divides a weighted or masked loss by the weights of the whole batch, which makes one example's
share depend on the others. Here each example has a loss of its own, and a batch's is their mean: so
clients train alike alone, side by side, and under example-level privacy.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from fedcore.task.kinds.protocol import TargetOptions


@dataclass(frozen=True)
class MeanCrossEntropy:
    """Mean over examples of cross-entropies over classes.

    An example's own loss is the mean over its positions that are not ignored, each times the weight
    of its class; it is 0 without any such position.
    """

    options: TargetOptions
    axis: int
    """Axis of the classes in the outputs: 1 or -1."""

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Returns the mean loss of outputs ``(B, ...)`` for class numbers, a scalar."""
        if self.axis == -1 and outputs.dim() > 2:
            outputs = outputs.movedim(-1, 1)
        kept = _kept(targets, self.options)
        each = functional.cross_entropy(
            outputs,
            targets if kept is None else torch.where(kept, targets, 0),
            weight=_weights(self.options, outputs),
            reduction="none",
            label_smoothing=self.options.label_smoothing,
        )
        return _mean(each, kept)


@dataclass(frozen=True)
class MeanBinaryCrossEntropy:
    """Mean over examples of binary cross-entropies of logits.

    An example's own loss is the mean over its targets that are not ignored; it is 0 without any.
    """

    options: TargetOptions
    of_labels: bool
    """Whether outputs ``(B, L)`` have a logit for each label: a class weight is then that of a
    label's ones. Else there are two, for targets 0 and 1."""

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Returns the mean loss of logits for targets of as many numbers, a scalar."""
        targets = targets.reshape(outputs.shape)
        kept = _kept(targets, self.options)
        hard = targets if kept is None else torch.where(kept, targets, 0)
        smoothing = self.options.label_smoothing
        soft = hard * (1 - smoothing) + smoothing / 2 if smoothing else hard
        weights = _weights(self.options, outputs)
        each = functional.binary_cross_entropy_with_logits(
            outputs,
            soft.to(outputs.dtype),
            pos_weight=weights if self.of_labels else None,
            reduction="none",
        )
        if weights is not None and not self.of_labels:
            each = each * torch.where(hard > 0.5, weights[1], weights[0])
        return _mean(each, kept)


def _kept(targets: Tensor, options: TargetOptions) -> Tensor | None:
    return None if options.ignore_index is None else targets != options.ignore_index


def _weights(options: TargetOptions, outputs: Tensor) -> Tensor | None:
    given = options.class_weights
    return torch.tensor(given, dtype=outputs.dtype, device=outputs.device) if given else None


def _mean(each: Tensor, kept: Tensor | None) -> Tensor:
    """Returns the mean over examples of each example's mean over the positions that count."""
    if kept is None:
        return each.mean()
    each = torch.where(kept, each, 0.0)
    if each.dim() == 1:
        return each.mean()
    each, kept = each.flatten(1), kept.flatten(1)
    return (each.sum(dim=1) / kept.sum(dim=1).clamp(min=1)).mean()
