"""Base class for a user's own federated-learning algorithm, in place of a Flower strategy.

Derive from `Algorithm`; the other types are arguments and results of its methods.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from fedcore.config.client_settings import RUN_SETTINGS, ClientSettings
from fedcore.config.run import ClientConfig

Weights = NDArray[np.float32]
"""All parameters of a model, shape ``(D,)``: flattened, in the model's order."""
State = Mapping[str, "NDArray[Any] | np.generic | bool | int | float | str"]
"""Memory of an algorithm: arrays or plain values by name. It is stored without pickle."""


@dataclass(frozen=True)
class Round:
    """The progress of a run, as an argument of an algorithm's methods.

    Example::

        rate = round.client.learning_rate * (1 - round.progress)
    """

    number: int
    """The round's number, from 1."""
    rounds: int
    """``federation.rounds``: the last round's number, unless the run ends earlier."""
    client: ClientConfig
    """The run's ``[client]`` in this round, after its schedules: settings of local training unless
    an algorithm changes them."""
    seed: int
    """Seed of this round, from the run's seed; unchanged when the round is repeated. Draw all
    randomness from it, with ``numpy.random.default_rng(round.seed)``."""

    @property
    def progress(self) -> float:
        """Progress from 0 in the first round to 1 in the last; 0 in a run of one round."""
        return (self.number - 1) / max(self.rounds - 1, 1)


@dataclass(frozen=True)
class ClientUpdate:
    """One client's contribution to a round.

    Example::

        mean = sum(one.num_examples * one.weights for one in updates) / total
    """

    client: str
    """The client's name."""
    weights: Weights
    """Weights after local training, ``(D,)``; read-only."""
    num_examples: int
    """The update's weight in a mean: 1 if all updates weigh the same."""
    metrics: Mapping[str, float]
    """Metrics that every client of the round reported, such as ``train_loss``; empty under
    privacy."""


class Algorithm:
    """Computes the next global model from a round's updates.

    A subclass sets `folds`, and implements `step` if it is true or `aggregate` if not. It has only
    options as attributes, best as a frozen dataclass: resuming a run creates a new instance, so
    anything that must survive a round belongs in the state.

    Array arguments are read-only. Equal arguments must give equal results; before a run the
    methods are also called on synthetic updates, to find mistakes.

    Example::

        class Slow(Algorithm):
            folds = True

            def step(self, round, weights, mean, state):
                return weights + 0.5 * (mean - weights), state
    """

    folds: ClassVar[bool] = True
    """Whether the next model depends on the updates only through their weighted mean. If true,
    updates are added to an exact mean as they arrive, in memory of the order of one model; else
    every update of a round is kept until the round ends."""

    def initial(self, weights: Weights) -> State:
        """Returns the state before the first round, given the run's initial weights."""
        return {}

    def configure(
        self, round: Round, clients: Sequence[str], state: State
    ) -> ClientSettings | Mapping[str, ClientSettings]:
        """Returns settings of local training for this round: one for all, or a mapping by client.

        A client that is not in the mapping trains with the run's settings. Under client-level
        privacy ``clients`` is empty and one answer is for all: the noise hides a client's update,
        but would not hide a trace of it in other clients' settings.
        """
        return RUN_SETTINGS

    def step(
        self, round: Round, weights: Weights, mean: Weights, state: State
    ) -> tuple[Weights, State]:
        """Returns the next global weights and state, if `folds` is true.

        Args:
            round: The round that has ended.
            weights: The weights that its clients received, ``(D,)``.
            mean: The weighted mean of the clients' weights, ``(D,)``; with noise under client-level
                privacy.
            state: The state before the round.
        """
        raise NotImplementedError(f"{type(self).__name__} folds updates and has no method step")

    def aggregate(
        self, round: Round, weights: Weights, updates: Sequence[ClientUpdate], state: State
    ) -> tuple[Weights, State]:
        """Returns the next global weights and state, if `folds` is false.

        Args:
            round: The round that has ended.
            weights: The weights that its clients received, ``(D,)``.
            updates: The clients' updates, at least one, in an order that the run determines.
            state: The state before the round.
        """
        raise NotImplementedError(f"{type(self).__name__} has no method aggregate")
