"""Sequences of various lengths: one of C classes at each position that has a target."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from fedcore.task.class_metrics import accuracy
from fedcore.task.kinds.losses import MeanCrossEntropy
from fedcore.task.kinds.next_token import NextToken
from fedcore.task.kinds.protocol import Loss, OutputForm, TargetOptions
from fedcore.task.metrics import Metric, perplexity

IGNORED = -100
"""Target of a position that does not count, where a task names no other."""


@dataclass(frozen=True)
class Sequence(NextToken):
    """Outputs ``(B, T, C)`` of logits; targets ``(B, T)``, -100 at positions without a target.

    Shorter sequences are padded to one length T. Each example's loss is the mean over its positions
    that count, so that short sequences weigh as much as long ones.
    """

    name: str = "sequence"

    def loss(self, options: TargetOptions) -> Loss:
        """Returns the cross-entropy over positions that count."""
        return MeanCrossEntropy(_with_padding(options), axis=-1)

    def metrics(self, options: TargetOptions) -> tuple[Metric, ...]:
        """Returns accuracy and perplexity over positions that count."""
        ignored = _with_padding(options).ignore_index
        return (accuracy(ignored=ignored), perplexity(ignored=ignored))

    def canonical(self, targets: Tensor, outputs: OutputForm, options: TargetOptions) -> Tensor:
        """Returns class numbers ``(B, T)``, and the ignored value."""
        return super().canonical(targets, outputs, _with_padding(options))


def _with_padding(options: TargetOptions) -> TargetOptions:
    return replace(options, ignore_index=IGNORED) if options.ignore_index is None else options
