"""What clients bring to a round that are trained together, and what they take from it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import isfinite

import torch
from torch import Tensor

from fedcore.config.run import ClientConfig
from fedcore.errors import TrainingDiverged
from fedcore.privacy.planning import PrivatePlan
from fedcore.task.definition import Examples, size_of
from fedcore.training.local import diverged


@dataclass(frozen=True)
class PrivateWork:
    """What a client needs to train with privacy; its ledger is charged already."""

    plan: PrivatePlan
    noise: Callable[[torch.device], torch.Generator]
    """A fresh generator on a device, which draws the noise that the client itself would."""


@dataclass(frozen=True)
class LocalWork:
    """What one client brings to a round."""

    examples: Examples
    order: Callable[[], torch.Generator]
    """A fresh generator, which draws the order of examples that the client itself would."""
    private: PrivateWork | None = None

    @cached_property
    def size(self) -> int:
        """How many examples it brings."""
        return size_of(self.examples)


@dataclass(frozen=True)
class TrainedClients:
    """What ``K`` clients have learnt."""

    weights: Tensor
    """Shape ``(K, D)``, float32, in the order of the model's parameters."""
    losses: Sequence[float | None]
    """Means over each one's last epoch, not finite when it diverged; None under privacy."""


def in_order(parts: Iterable[tuple[Sequence[int], TrainedClients]]) -> TrainedClients:
    """What groups of clients have learnt, each with its places, in the order of all places."""
    found = list(parts)
    places = [place for group, _ in found for place in group]
    if len(found) == 1 and places == sorted(places):
        return found[0][1]
    first = found[0][1].weights
    weights = first.new_empty((len(places), first.shape[1]))
    losses: list[float | None] = [None] * len(places)
    for group, trained in found:
        weights[list(group)] = trained.weights
        for place, loss in zip(group, trained.losses, strict=True):
            losses[place] = loss
    return TrainedClients(weights, losses)


def divergence(loss: float | None, finite: bool, settings: ClientConfig) -> TrainingDiverged | None:
    """What is wrong with a client that was trained beside others; None where nothing is.

    Args:
        loss: The mean over its last epoch; None under privacy.
        finite: Whether its weights are.
        settings: What it was trained with.
    """
    if loss is not None and not isfinite(loss):
        return diverged(loss, epoch=settings.epochs - 1, learning_rate=settings.learning_rate)
    if not finite:
        return TrainingDiverged(
            f"training: the trained weights are not finite at learning_rate "
            f"{settings.learning_rate}. No update was sent; lower the learning rate."
        )
    return None
