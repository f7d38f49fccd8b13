"""How far the rounds of a run are, and what makes that durable."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from flwr.app import Message

from fedcore.updates.pack import Vector
from server.records import RoundRecord
from server.rounds.protection import Protection
from server.rounds.strategy_state import StrategyState


@dataclass(frozen=True)
class Progress:
    """What rounds need, beside their clients' state, to go on and give the same bits."""

    round: int
    """The last one that is over; 0 before the first."""
    over: bool
    """Whether no round follows."""
    weights: Vector
    """Of the global model."""
    best: Vector
    best_round: int
    most_failed: int
    """Clients that failed in the worst round so far."""
    strategy: StrategyState
    preprocess: bytes
    """State of the preprocessing, as safetensors."""
    protection: Protection | None = None
    """Of clients, under client-level privacy."""
    spent: frozenset[int] = field(default=frozenset(), compare=False)
    """Devices that have declined for their budget while this process ran. It is not kept: after a
    restart each is asked again, and tells again."""


@dataclass(frozen=True)
class Start:
    """Where rounds that were interrupted go on."""

    progress: Progress
    records: tuple[RoundRecord, ...]
    """Of the rounds that are over."""
    cohort: int | None = None
    """How many each round asks; as the run says, and as there are clients, when None."""


class RoundCheckpointer(Protocol):
    """Makes rounds durable, so that a run that is interrupted can be resumed.

    Nothing that it is given changes afterwards.
    """

    def commit(self, progress: Progress, record: RoundRecord | None) -> None:
        """Makes everything up to ``progress`` durable.

        Called before the first round and after each.

        Args:
            progress: Where the rounds are.
            record: Of the round that has ended; None before the first round of a process.
        """

    def may_continue(self, progress: Progress) -> bool:
        """Waits while rounds are paused; False where they are to end at ``progress``."""

    def cohort(self, kind: str, draw: Callable[[], list[int]]) -> list[int]:
        """The nodes that a round sends messages of ``kind``.

        They are those that the round selected before it was interrupted, or else what ``draw``
        returns, made durable.
        """

    def begin(self, nodes: Sequence[int]) -> None:
        """Called before the nodes of a round are asked to train."""

    def accept(self, reply: Message) -> Message:
        """Makes a reply durable that passed every check, before anything follows from it.

        Returns the same reply; its large arrays may lie elsewhere now.
        """

    def discard(self, reply: Message) -> bool:
        """Forgets a reply that is refused; True where it had been accepted, by a process before."""

    def advice(self, progress: Progress, reasons: Sequence[str]) -> Sequence[str]:
        """What a user can do about clients that failed in the round after ``progress``."""

    def fail(self, progress: Progress) -> None:
        """Called when the round after ``progress`` has failed, and with it the run."""


class NoCheckpoints:
    """Makes nothing durable: a run that is interrupted starts again."""

    def commit(self, progress: Progress, record: RoundRecord | None) -> None:
        """Nothing."""

    def may_continue(self, progress: Progress) -> bool:
        """Always."""
        return True

    def cohort(self, kind: str, draw: Callable[[], list[int]]) -> list[int]:
        """What ``draw`` returns."""
        return draw()

    def begin(self, nodes: Sequence[int]) -> None:
        """Nothing."""

    def accept(self, reply: Message) -> Message:
        """The reply as it is."""
        return reply

    def discard(self, reply: Message) -> bool:
        """Nothing was accepted before."""
        return False

    def advice(self, progress: Progress, reasons: Sequence[str]) -> Sequence[str]:
        """No advice."""
        return ()

    def fail(self, progress: Progress) -> None:
        """Nothing."""


class Peers(Protocol):
    """Who clients are, and where it is told that a reply of one was refused."""

    def name(self, node_id: int) -> str:
        """What people call a node, fit to be printed."""

    def client(self, node_id: int) -> str:
        """The name of a node's client, as an algorithm is told it."""

    def said(self, node_id: int, reason: str) -> str:
        """What a node says of its failure, as a line that names the node."""

    def refused(self, node_id: int, reason: str) -> None:
        """A reply of a node was refused for ``reason``."""


class NumberedPeers:
    """Clients that nothing is known of but their numbers."""

    def name(self, node_id: int) -> str:
        """Its number."""
        return f"node {node_id}"

    def client(self, node_id: int) -> str:
        """Its number."""
        return f"node {node_id}"

    def said(self, node_id: int, reason: str) -> str:
        """The reason alone: clients name themselves."""
        return reason

    def refused(self, node_id: int, reason: str) -> None:
        """The round tells."""
