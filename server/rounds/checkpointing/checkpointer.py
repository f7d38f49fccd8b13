"""`RoundCheckpointer` makes rounds durable; simulation and deployment each implement it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from flwr.app import Message

from server.records import RoundRecord
from server.rounds.checkpointing.progress import Progress
from server.rounds.cohort import Cohort, Draw


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

    def wait_if_paused(self, progress: Progress) -> None:
        """Blocks while rounds are paused, after each commit.

        Raises:
            ServerStopped: rounds were stopped meanwhile.
        """

    def stops_after(self, progress: Progress) -> bool:
        """Returns whether the run was asked to end at ``progress``, before its last round."""

    def cohort(self, kind: str, draw: Draw) -> Cohort:
        """Returns the cohort that the round sends messages of type ``kind``.

        Returns the cohort drawn before an interruption of this round, if there is one. Else calls
        ``draw``, makes its result durable and returns it. On a live run it calls ``draw`` again
        while too few devices are connected, and in the end accepts a short cohort.
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

    def wait_if_paused(self, progress: Progress) -> None:
        """Does nothing: rounds are never paused."""

    def stops_after(self, progress: Progress) -> bool:
        """Returns False: rounds are never stopped."""
        return False

    def cohort(self, kind: str, draw: Draw) -> Cohort:
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
