"""Binary: one of two classes for each input, from one logit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from fedcore.artifacts.presentation import Presentation
from fedcore.task.class_metrics import accuracy
from fedcore.task.kinds.classification import CLASS_OPTIONS
from fedcore.task.kinds.losses import MeanBinaryCrossEntropy
from fedcore.task.kinds.protocol import Kind, Loss, OutputForm, TargetFault, TargetOptions
from fedcore.task.kinds.targets import shown, zeros_and_ones
from fedcore.task.metrics import Metric


@dataclass(frozen=True)
class Binary(Kind):
    """Outputs ``(B,)`` or ``(B, 1)``, the logit of 1; targets 0 or 1, floats of their shape."""

    name: str = "binary"
    presentation: Presentation = "binary"
    options: frozenset[str] = CLASS_OPTIONS
    logits: bool = True

    def loss(self, options: TargetOptions) -> Loss:
        """Returns the binary cross-entropy of the logits."""
        return MeanBinaryCrossEntropy(options, of_labels=False)

    def metrics(self, options: TargetOptions) -> tuple[Metric, ...]:
        """Returns the accuracy, with the decision at a logit of 0."""
        return (accuracy(axis=None, ignored=options.ignore_index),)

    def wrong_outputs(self, outputs: OutputForm) -> str:
        """Returns why the outputs are not one logit for each input."""
        shape = tuple(outputs.shape)
        if shape in ((), (1,)):
            return ""
        return (
            f"outputs of one input have shape {shape}; kind 'binary' takes one logit. End the "
            "model with one output, or set kind='classification' for an output for each class, "
            "kind='multilabel' for several labels at once"
        )

    def labels(self, outputs: OutputForm) -> int:
        """Returns 2: names of 0 and of 1."""
        return 2

    def canonical(self, targets: Tensor, outputs: OutputForm, options: TargetOptions) -> Tensor:
        """Returns 0 and 1 in the outputs' shape and dtype; takes numbers and bools."""
        if targets[0].numel() != 1:
            raise TargetFault(
                (0,),
                f"{shown(targets[0])} of shape {tuple(targets.shape[1:])}",
                "0 or 1",
                "set kind='classification' for one-hot targets, 'multilabel' for several labels",
            )
        floats = zeros_and_ones(targets, options, _float_of(outputs))
        return floats.reshape(len(targets), *outputs.shape)

    def synthetic(self, outputs: Tensor, rng: torch.Generator) -> Iterator[Tensor]:
        """Yields zeros and ones."""
        yield (torch.arange(len(outputs)) % 2).to(outputs.dtype).reshape(outputs.shape)
        yield torch.randint(2, (len(outputs),), generator=rng)

    def distance(self, own: Tensor, told: Tensor, targets: Tensor, loss: Loss) -> Tensor:
        """Returns the cross-entropy of the teacher's probabilities."""
        return functional.binary_cross_entropy_with_logits(own, told.sigmoid())


def _float_of(outputs: OutputForm) -> torch.dtype:
    return outputs.dtype if outputs.dtype.is_floating_point else torch.float32
