"""Segmentation: one of C classes at each position of an image, a volume or a signal."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fedcore.artifacts.presentation import Presentation
from fedcore.task.class_metrics import accuracy, dice, mean_iou
from fedcore.task.kinds.classification import CLASS_OPTIONS, soft_cross_entropy
from fedcore.task.kinds.losses import MeanCrossEntropy
from fedcore.task.kinds.protocol import Kind, Loss, OutputForm, TargetFault, TargetOptions
from fedcore.task.kinds.targets import class_numbers, from_one_hot, squeezed, whole_numbers
from fedcore.task.metrics import Metric


@dataclass(frozen=True)
class Segmentation(Kind):
    """Outputs ``(B, C, ...)`` of logits; targets ``(B, ...)`` of class numbers, int64."""

    name: str = "segmentation"
    presentation: Presentation = "dense"
    options: frozenset[str] = CLASS_OPTIONS
    logits: bool = True

    def loss(self, options: TargetOptions) -> Loss:
        """Returns the cross-entropy, averaged over positions and then over examples."""
        return MeanCrossEntropy(options, axis=1)

    def metrics(self, options: TargetOptions) -> tuple[Metric, ...]:
        """Returns mean IoU, Dice and the share of right positions."""
        ignored = options.ignore_index
        pixels = accuracy(axis=1, ignored=ignored, name="pixel_accuracy")
        return (mean_iou(ignored=ignored), dice(ignored=ignored), pixels)

    def wrong_outputs(self, outputs: OutputForm) -> str:
        """Returns why the outputs are not logits at each position."""
        shape = tuple(outputs.shape)
        if len(shape) >= 2 and shape[0] > 1:
            return ""
        return (
            f"outputs of one input have shape {shape}; kind 'segmentation' takes (C, ...): a "
            "number for each of two or more classes at each position. Give the last layer an "
            "output channel for each class, the background included"
        )

    def labels(self, outputs: OutputForm) -> int:
        """Returns the number of classes."""
        return outputs.shape[0]

    def canonical(self, targets: Tensor, outputs: OutputForm, options: TargetOptions) -> Tensor:
        """Returns class numbers ``(B, ...)``; takes whole numbers of any dtype, and one-hot."""
        shape = tuple(outputs.shape)
        if tuple(targets.shape[1:]) == shape:
            return from_one_hot(targets, shape[0], several="give one class at each position")
        targets = squeezed(targets, len(shape))
        if tuple(targets.shape[1:]) != shape[1:]:
            raise TargetFault(
                (0,),
                f"a target of shape {tuple(targets.shape[1:])}",
                f"one class at each of the positions {shape[1:]} of the outputs {shape}",
                "give targets the outputs' height and width",
            )
        remedy = "number the classes from 0; divide masks of 0 and 255 by 255"
        return class_numbers(
            whole_numbers(targets, remedy=remedy), shape[0], options, expected_of="output channels"
        )

    def synthetic(self, outputs: Tensor, rng: torch.Generator) -> Iterator[Tensor]:
        """Yields class numbers, and the forms that own losses take."""
        shape = (len(outputs), *outputs.shape[2:])
        yield torch.randint(outputs.shape[1], shape, generator=rng)
        yield torch.randint(2, tuple(outputs.shape), generator=rng).float()
        yield torch.randn(tuple(outputs.shape), generator=rng)

    def distance(self, own: Tensor, told: Tensor, targets: Tensor, loss: Loss) -> Tensor:
        """Returns the cross-entropy of the teacher's distributions over classes."""
        return soft_cross_entropy(own, told, axis=1)
