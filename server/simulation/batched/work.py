"""Input and result of batched training: each client's examples and random streams; weights."""

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
    """Plan and noise of a client's private training; its ledger is already charged."""

    plan: PrivatePlan
    noise: Callable[[torch.device], torch.Generator]
    """Returns a new generator on a device, for the same noise as in training by itself."""


@dataclass(frozen=True)
class LocalWork:
    """Examples and random streams of one client in a round."""

    examples: Examples
    order: Callable[[], torch.Generator]
    """Returns a new generator, for the same order of examples as in training by itself."""
    private: PrivateWork | None = None
    layers: Callable[[], torch.Generator] = torch.Generator
    """Returns a new generator, for the same dropout as in training by itself."""

    @cached_property
    def size(self) -> int:
        """Number of examples."""
        return size_of(self.examples)


@dataclass(frozen=True)
class TrainedClients:
    """Weights and losses of ``K`` trained clients."""

    weights: Tensor
    """Shape ``(K, D)``, float32, in the order of the model's parameters."""
    losses: Sequence[float | None]
    """Mean over each client's last epoch, not finite where it diverged; None under privacy."""


def in_order(parts: Iterable[tuple[Sequence[int], TrainedClients]]) -> TrainedClients:
    """Merges the results of groups, given with their indices, into the order of the indices."""
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


def divergence(
    loss: float | None, finite: bool, settings: ClientConfig, examples: Examples
) -> TrainingDiverged | None:
    """Returns the error of a client that diverged in batched training; None otherwise.

    Args:
        loss: Mean loss over its last epoch; None under privacy.
        finite: Whether its weights are finite.
        settings: Settings that it was trained with.
        examples: Its data, of which an input that is not finite is named.
    """
    if loss is not None and not isfinite(loss):
        epoch = settings.epochs - 1 if settings.steps is None else None
        return diverged(loss, epoch=epoch, learning_rate=settings.learning_rate, examples=examples)
    if not finite:
        return TrainingDiverged(
            f"training: the trained weights are not finite at learning_rate "
            f"{settings.learning_rate}. No update was sent; lower the learning rate."
        )
    return None
