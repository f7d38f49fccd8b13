"""How far the rounds of a run are, and who keeps that for the day they are interrupted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from flwr.app import Message

from fedcore.updates.pack import Vector
from server.records import RoundRecord
from server.rounds.protection import Protection
from server.rounds.strategy_state import Remembered


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
    strategy: Remembered
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


class Keeper(Protocol):
    """Keeps what it takes to go on with rounds that are interrupted.

    Nothing that it is given changes afterwards.
    """

    def goes_on(self, progress: Progress) -> bool:
        """Asked before the first round and after each; False ends the rounds there."""

    def asked(self, kind: str, draw: Callable[[], list[int]]) -> list[int]:
        """Whom a round asks with messages of ``kind``: as ``draw`` says, or said before."""

    def begin(self, nodes: Sequence[int]) -> None:
        """These nodes are about to be asked to train."""

    def accept(self, reply: Message) -> Message:
        """Makes a reply durable that passed every check, before anything follows from it.

        Returns the same reply; its large arrays may lie elsewhere now.
        """

    def discard(self, reply: Message) -> bool:
        """Forgets a reply that is refused; True where it had been accepted, by a process before."""

    def failures(self, progress: Progress, reasons: Sequence[str]) -> Sequence[str]:
        """Clients failed for ``reasons`` in the round after ``progress``: what a user can do."""

    def fail(self, progress: Progress) -> None:
        """The round after ``progress`` failed, and with it the run."""


class Forgetful:
    """Keeps nothing."""

    def goes_on(self, progress: Progress) -> bool:
        """Always."""
        return True

    def asked(self, kind: str, draw: Callable[[], list[int]]) -> list[int]:
        """As ``draw`` says."""
        return draw()

    def begin(self, nodes: Sequence[int]) -> None:
        """Nothing."""

    def accept(self, reply: Message) -> Message:
        """The reply as it is."""
        return reply

    def discard(self, reply: Message) -> bool:
        """Nothing was accepted before."""
        return False

    def failures(self, progress: Progress, reasons: Sequence[str]) -> Sequence[str]:
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


class Nameless:
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
