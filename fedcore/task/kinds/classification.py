"""Classification: one of C classes for each input."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from fedcore.artifacts.presentation import Presentation
from fedcore.task.class_metrics import accuracy
from fedcore.task.kinds.losses import MeanCrossEntropy
from fedcore.task.kinds.protocol import Kind, Loss, OutputForm, TargetFault, TargetOptions
from fedcore.task.kinds.targets import (
    MULTILABEL,
    class_numbers,
    from_one_hot,
    shown,
    squeezed,
    whole_numbers,
)
from fedcore.task.metrics import ACCURACY, Metric

CLASS_OPTIONS = frozenset({"class_weights", "ignore_index", "label_smoothing"})


@dataclass(frozen=True)
class Classification(Kind):
    """Outputs ``(B, C)`` of logits; targets ``(B,)`` of class numbers, int64."""

    name: str = "classification"
    presentation: Presentation = "label"
    options: frozenset[str] = CLASS_OPTIONS
    logits: bool = True

    def loss(self, options: TargetOptions) -> Loss:
        """Returns the cross-entropy."""
        return MeanCrossEntropy(options, axis=1) if options else functional.cross_entropy

    def metrics(self, options: TargetOptions) -> tuple[Metric, ...]:
        """Returns the accuracy."""
        if options.ignore_index is None:
            return (ACCURACY,)
        return (accuracy(ignored=options.ignore_index),)

    def wrong_outputs(self, outputs: OutputForm) -> str:
        """Returns why the outputs are not one row of logits for each input."""
        shape = tuple(outputs.shape)
        if len(shape) > 1:
            return (
                f"outputs of one input have shape {shape}; kind 'classification' takes one number "
                "for each class. Set kind='segmentation' for a class at each position with classes "
                "on the first axis, or kind='next_token' or 'sequence' with classes on the last"
            )
        if not shape or shape[0] == 1:
            return (
                f"outputs of one input have shape {shape}; with a single output the cross-entropy "
                "is 0 whatever the weights are. Set kind='binary' for one logit, or give the model "
                "an output for each class"
            )
        return ""

    def labels(self, outputs: OutputForm) -> int:
        """Returns the number of classes."""
        return outputs.shape[-1]

    def canonical(self, targets: Tensor, outputs: OutputForm, options: TargetOptions) -> Tensor:
        """Returns class numbers ``(B,)``; takes whole numbers of any dtype, and one-hot rows."""
        classes = outputs.shape[-1]
        if targets.dim() == 2 and targets.shape[1] == classes > 1:
            return from_one_hot(targets, classes)
        targets = squeezed(targets, 1)
        if targets.dim() != 1:
            shape, got = tuple(targets.shape[1:]), shown(targets[0])
            raise TargetFault(
                (0,), f"{got} of shape {shape}", "the number of one class", MULTILABEL
            )
        remedy = "number the classes from 0; for quantities, set kind='regression'"
        return class_numbers(whole_numbers(targets, remedy=remedy), classes, options)

    def synthetic(self, outputs: Tensor, rng: torch.Generator) -> Iterator[Tensor]:
        """Yields class numbers, and the forms that own losses take."""
        count = len(outputs)
        classes = outputs.shape[-1] if outputs.dim() > 1 else 2
        yield torch.arange(count) % classes  # always more than one class
        yield torch.randint(classes, tuple(outputs.shape[:-1]), generator=rng)
        yield torch.randn(tuple(outputs.shape), generator=rng)
        yield torch.randn((count,), generator=rng)
        yield torch.randint(2, tuple(outputs.shape), generator=rng).float()

    def distance(self, own: Tensor, told: Tensor, targets: Tensor, loss: Loss) -> Tensor:
        """Returns the cross-entropy of the teacher's distribution over classes."""
        return soft_cross_entropy(own, told, axis=-1)


def soft_cross_entropy(own: Tensor, told: Tensor, *, axis: int) -> Tensor:
    """Returns the mean cross-entropy of the distribution ``told`` under ``own``, both logits."""
    likely = functional.log_softmax(own, dim=axis)
    return -(functional.softmax(told, dim=axis) * likely).sum(dim=axis).mean()
