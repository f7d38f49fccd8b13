"""Multilabel: any number of L labels for each input."""

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
from fedcore.task.kinds.targets import zeros_and_ones
from fedcore.task.metrics import Metric


@dataclass(frozen=True)
class Multilabel(Kind):
    """Outputs ``(B, L)`` of logits; targets ``(B, L)`` of 0 and 1, floats."""

    name: str = "multilabel"
    presentation: Presentation = "labels"
    options: frozenset[str] = CLASS_OPTIONS
    logits: bool = True

    def loss(self, options: TargetOptions) -> Loss:
        """Returns the binary cross-entropy, averaged over labels and then over examples."""
        return MeanBinaryCrossEntropy(options, of_labels=True)

    def metrics(self, options: TargetOptions) -> tuple[Metric, ...]:
        """Returns the share of right decisions over all labels."""
        ignored = options.ignore_index
        return (accuracy(axis=None, ignored=ignored, name="label_accuracy"),)

    def wrong_outputs(self, outputs: OutputForm) -> str:
        """Returns why the outputs are not one logit for each label."""
        if len(outputs.shape) == 1:
            return ""
        return (
            f"outputs of one input have shape {tuple(outputs.shape)}; kind 'multilabel' takes one "
            "logit for each label. End the model with as many outputs as there are labels"
        )

    def labels(self, outputs: OutputForm) -> int:
        """Returns the number of labels."""
        return outputs.shape[0]

    def canonical(self, targets: Tensor, outputs: OutputForm, options: TargetOptions) -> Tensor:
        """Returns 0 and 1 for each label, floats; takes numbers and bools."""
        if targets.shape[1:] != outputs.shape:
            raise TargetFault(
                (0,),
                f"a target of shape {tuple(targets.shape[1:])}",
                f"0 or 1 for each of {outputs.shape[0]} labels",
                "give a 1 at each label that applies; for one class number an input, set "
                "kind='classification'",
            )
        dtype = outputs.dtype if outputs.dtype.is_floating_point else torch.float32
        return zeros_and_ones(targets, options, dtype)

    def synthetic(self, outputs: Tensor, rng: torch.Generator) -> Iterator[Tensor]:
        """Yields zeros and ones."""
        yield torch.randint(2, tuple(outputs.shape), generator=rng).to(outputs.dtype)

    def distance(self, own: Tensor, told: Tensor, targets: Tensor, loss: Loss) -> Tensor:
        """Returns the cross-entropy of the teacher's probabilities, averaged over labels."""
        return functional.binary_cross_entropy_with_logits(own, told.sigmoid())
