"""State of a run between rounds: all that a resumed run needs, except the clients' own state."""

from __future__ import annotations

from dataclasses import dataclass, field

from fedcore.updates.frozen import NO_FROZEN, FrozenState
from fedcore.updates.pack import Vector
from server.records import RoundRecord
from server.rounds.client_privacy.protection import Protection
from server.rounds.strategies.state import StrategyState


@dataclass(frozen=True)
class Progress:
    """State from which rounds continue with the same bits, except the clients' own state."""

    round: int
    """Number of the last completed round; 0 before the first."""
    over: bool
    """Whether the run has ended: no round follows."""
    weights: Vector
    """Weights of the global model, shape ``(D,)``."""
    best: Vector
    best_round: int
    most_failed: int
    """Largest number of clients that failed in one round so far."""
    strategy: StrategyState
    preprocess: bytes
    """State of the preprocessing, as safetensors bytes."""
    frozen: FrozenState = NO_FROZEN
    """The model's frozen parameters, which no round changes."""
    protection: Protection | None = None
    """State of client-level privacy; None where the run does not use it."""
    spent: frozenset[int] = field(default=frozenset(), compare=False)
    """Nodes that declined since this process started because their budget is spent. Not
    persisted: after a restart, each is asked again and declines again."""


@dataclass(frozen=True)
class Start:
    """State from which an interrupted run resumes."""

    progress: Progress
    records: tuple[RoundRecord, ...]
    """One record per completed round."""
    cohort: int | None = None
    """Number of clients per round. When None, the run's setting applies, or the number of
    connected clients where the run sets none."""
