"""What a user brings in place of a strategy of Flower's: an algorithm of federated learning.

`Algorithm` is the one class to derive from; the other types are what its methods are given.
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
"""A whole model, ``(D,)``: every parameter, flattened, in the model's own order."""
State = Mapping[str, "NDArray[Any] | np.generic | bool | int | float | str"]
"""What an algorithm remembers: names, and arrays or plain values. It is kept without pickle."""


@dataclass(frozen=True)
class Round:
    """Where a run stands when an algorithm is asked."""

    number: int
    """From 1."""
    rounds: int
    """``federation.rounds``: the last one's number, unless the run ends earlier."""
    client: ClientConfig
    """The run's ``[client]``: what clients train with unless an algorithm says otherwise."""
    seed: int
    """Of this round alone, from the run's seed; the same when the round is done again. Draw from
    it, as ``numpy.random.default_rng(round.seed)``, and nothing else."""

    @property
    def progress(self) -> float:
        """From 0 in the first round to 1 in the last; 0 where there is one alone."""
        return (self.number - 1) / max(self.rounds - 1, 1)


@dataclass(frozen=True)
class ClientUpdate:
    """What one client sent."""

    client: str
    """Its name."""
    weights: Weights
    """After local training, ``(D,)``; read-only."""
    num_examples: int
    """What it weighs: 1 where all weigh the same."""
    metrics: Mapping[str, float]
    """What every client of the round reported, as ``train_loss``; nothing under privacy."""


class Algorithm:
    """How a server makes the next global model of a round's updates.

    A subclass says whether it folds, and has `step` or `aggregate` accordingly. It holds options
    alone, best as a frozen dataclass: an instance is made anew on resume, and what is to outlive a
    round belongs in the state.

    Arrays that methods are given are read-only. The same arguments must give the same result, and
    methods are also called before a run, on made-up updates, to find mistakes.

    Example::

        class Slow(Algorithm):
            folds = True

            def step(self, round, weights, mean, state):
                return weights + 0.5 * (mean - weights), state
    """

    folds: ClassVar[bool] = True
    """Whether the next model follows from the weighted mean of the updates alone. Then updates are
    added into an exact mean as they arrive, in memory of the order of one model; else every update
    of a round is held until it ends."""

    def initial(self, weights: Weights) -> State:
        """The state before the first round; ``weights`` are those that the run starts from."""
        return {}

    def configure(
        self, round: Round, clients: Sequence[str], state: State
    ) -> ClientSettings | Mapping[str, ClientSettings]:
        """How clients train in this round: one answer for all, or one for each by its name.

        A client that the mapping leaves out trains with the run's settings. Under client-level
        privacy ``clients`` is empty and one answer is for all: noise hides one client's update, and
        no traces of it in the settings of others.
        """
        return RUN_SETTINGS

    def step(
        self, round: Round, weights: Weights, mean: Weights, state: State
    ) -> tuple[Weights, State]:
        """The next global weights and state, of an algorithm that folds.

        Args:
            round: The round that is over.
            weights: What its clients were sent, ``(D,)``.
            mean: The weighted mean of what they sent back, ``(D,)``; with its noise under
                client-level privacy.
            state: Before the round.
        """
        raise NotImplementedError

    def aggregate(
        self, round: Round, weights: Weights, updates: Sequence[ClientUpdate], state: State
    ) -> tuple[Weights, State]:
        """The next global weights and state, of an algorithm that needs every update.

        Args:
            round: The round that is over.
            weights: What its clients were sent, ``(D,)``.
            updates: What they sent back, at least one, in an order that the run fixes.
            state: Before the round.
        """
        raise NotImplementedError
