"""State of a run between rounds, and the interfaces that persist it and name its clients.

`Progress` is everything that a resumed run needs, except the clients' state. `RoundCheckpointer`
makes it durable: the simulation and the deployment server each have an implementation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from flwr.app import Message

from fedcore.updates.pack import Vector
from server.records import RoundRecord
from server.rounds.protection import Protection
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


class RoundCheckpointer(Protocol):
    """Interface that makes rounds durable, so that an interrupted run can resume.

    Callers never modify an object after they pass it in.
    """

    def commit(self, progress: Progress, record: RoundRecord | None) -> None:
        """Makes everything up to ``progress`` durable.

        Called before the first round and after each round.

        Args:
            progress: State of the run.
            record: Of the round that has ended; None where no round has: before the first round of
                a process, or where spent budgets end the run.
        """

    def may_continue(self, progress: Progress) -> bool:
        """Blocks while rounds are paused; returns False where they end at ``progress``."""

    def cohort(self, kind: str, draw: Callable[[], list[int]]) -> list[int]:
        """Returns the nodes that the round sends messages of type ``kind``.

        Returns the nodes selected before an interruption of this round, if there are any. Else
        calls ``draw``, makes its result durable and returns it.
        """

    def begin(self, nodes: Sequence[int]) -> None:
        """Callback before the round's nodes are asked to train."""

    def accept(self, replies: Sequence[Message]) -> Sequence[Message]:
        """Makes checked replies durable, all or none, before they have any effect.

        Returns equivalent replies, whose large arrays may be stored elsewhere, such as on disk.
        """

    def discard(self, reply: Message) -> bool:
        """Drops a rejected reply; returns True where an earlier process had accepted it."""

    def advice(self, progress: Progress, reasons: Sequence[str]) -> Sequence[str]:
        """Returns advice for the user on clients that failed in the round after ``progress``.

        ``reasons`` contains the failures of that round.
        """

    def fail(self, progress: Progress) -> None:
        """Callback when the round after ``progress`` has failed, which ends the run."""


class NoCheckpoints:
    """Checkpointer that makes nothing durable: an interrupted run starts from the beginning."""

    def commit(self, progress: Progress, record: RoundRecord | None) -> None:
        """Does nothing."""

    def may_continue(self, progress: Progress) -> bool:
        """Returns True: rounds are never paused or stopped."""
        return True

    def cohort(self, kind: str, draw: Callable[[], list[int]]) -> list[int]:
        """Draws a new cohort."""
        return draw()

    def begin(self, nodes: Sequence[int]) -> None:
        """Does nothing."""

    def accept(self, replies: Sequence[Message]) -> Sequence[Message]:
        """Returns the replies unchanged."""
        return replies

    def discard(self, reply: Message) -> bool:
        """Returns False: no earlier process has accepted a reply."""
        return False

    def advice(self, progress: Progress, reasons: Sequence[str]) -> Sequence[str]:
        """Returns no advice."""
        return ()

    def fail(self, progress: Progress) -> None:
        """Does nothing."""


class Peers(Protocol):
    """Interface that maps node ids to clients' names and is notified of rejected replies."""

    def name(self, node_id: int) -> str:
        """Returns a node's display name, safe to print."""

    def client(self, node_id: int) -> str:
        """Returns the name under which an algorithm sees the node's client."""

    def said(self, node_id: int, reason: str) -> str:
        """Returns a node's failure reason as one line that names the node."""

    def refused(self, node_id: int, reason: str) -> None:
        """Callback when a reply of a node is rejected for ``reason``."""


class NumberedPeers:
    """Peers that are known only by their node ids."""

    def name(self, node_id: int) -> str:
        """Returns ``node <id>``."""
        return f"node {node_id}"

    def client(self, node_id: int) -> str:
        """Returns ``node <id>``."""
        return f"node {node_id}"

    def said(self, node_id: int, reason: str) -> str:
        """Returns the reason unchanged: virtual clients name themselves in it."""
        return reason

    def refused(self, node_id: int, reason: str) -> None:
        """Does nothing: the round's own error or note reports the rejection."""
