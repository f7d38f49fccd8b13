"""Next token: one of V tokens at each of T positions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from fedcore.artifacts.presentation import Presentation
from fedcore.task.class_metrics import accuracy
from fedcore.task.kinds.classification import CLASS_OPTIONS, soft_cross_entropy
from fedcore.task.kinds.losses import MeanCrossEntropy
from fedcore.task.kinds.protocol import Kind, Loss, OutputForm, TargetFault, TargetOptions
from fedcore.task.kinds.targets import class_numbers, whole_numbers
from fedcore.task.metrics import ACCURACY, PERPLEXITY, Metric, perplexity


def _token_loss(output: Tensor, target: Tensor) -> Tensor:
    return functional.cross_entropy(output.transpose(1, 2), target)


@dataclass(frozen=True)
class NextToken(Kind):
    """Outputs ``(B, T, V)`` of logits; targets ``(B, T)`` of token numbers, int64."""

    name: str = "next_token"
    presentation: Presentation = "tokens"
    options: frozenset[str] = CLASS_OPTIONS
    logits: bool = True

    def loss(self, options: TargetOptions) -> Loss:
        """Returns the cross-entropy, averaged over positions and then over examples."""
        return MeanCrossEntropy(options, axis=-1) if options else _token_loss

    def metrics(self, options: TargetOptions) -> tuple[Metric, ...]:
        """Returns accuracy and perplexity over positions."""
        if options.ignore_index is None:
            return (ACCURACY, PERPLEXITY)
        ignored = options.ignore_index
        return (accuracy(ignored=ignored), perplexity(ignored=ignored))

    def wrong_outputs(self, outputs: OutputForm) -> str:
        """Returns why the outputs are not logits at each position."""
        if len(outputs.shape) == 2:
            return ""
        return (
            f"outputs of one input have shape {tuple(outputs.shape)}; kind {self.name!r} takes "
            "(T, V): a number for each of V classes at each of T positions. Return the outputs of "
            "all positions, or set kind='classification' for one class an input"
        )

    def labels(self, outputs: OutputForm) -> int:
        """Returns the number of tokens or classes."""
        return outputs.shape[-1]

    def canonical(self, targets: Tensor, outputs: OutputForm, options: TargetOptions) -> Tensor:
        """Returns token numbers ``(B, T)``; takes whole numbers of any dtype."""
        if targets.dim() != 2:
            raise TargetFault(
                (0,),
                f"targets of shape {tuple(targets.shape[1:])}",
                "one token or class at each position",
                "give as many targets as the input has positions",
            )
        numbers = whole_numbers(targets, remedy="give token numbers from 0")
        return class_numbers(numbers, outputs.shape[-1], options, expected_of="outputs a position")

    def synthetic(self, outputs: Tensor, rng: torch.Generator) -> Iterator[Tensor]:
        """Yields token numbers, and the forms that own losses take."""
        count, classes = len(outputs), outputs.shape[-1]
        yield torch.randint(classes, tuple(outputs.shape[:-1]), generator=rng)
        yield torch.arange(count) % classes
        yield torch.randn(tuple(outputs.shape), generator=rng)
        yield torch.randn((count,), generator=rng)
        yield torch.randint(2, tuple(outputs.shape), generator=rng).float()

    def distance(self, own: Tensor, told: Tensor, targets: Tensor, loss: Loss) -> Tensor:
        """Returns the cross-entropy of the teacher's distributions over tokens."""
        return soft_cross_entropy(own, told, axis=-1)
