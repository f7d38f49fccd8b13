"""A wrapper around a checkpointer that lets operators pause, stop and back up a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from flwr.app import Message

from server.records import RoundRecord
from server.rounds.checkpointing.checkpointer import RoundCheckpointer
from server.rounds.checkpointing.progress import Progress
from server.rounds.cohort import Cohort, Draw


@dataclass(frozen=True)
class SteeredCheckpointer:
    """A `RoundCheckpointer` that pauses and stops between rounds on operators' requests."""

    checkpointer: RoundCheckpointer
    """Checkpointer that all calls are forwarded to."""
    block_while_paused: Callable[[Progress, Callable[[], None]], None]
    """Called between rounds; blocks while the run is paused or a backup is taken. Meanwhile, and
    before it returns, it calls its second argument."""
    allow_requests_while_waiting: Callable[[], None]
    """Called before each further attempt of a round that has found too few devices."""
    between: Callable[[], None] = lambda: None
    """Carries out what operators want done between rounds."""

    def commit(self, progress: Progress, record: RoundRecord | None) -> None:
        self.checkpointer.commit(progress, record)

    def wait_if_paused(self, progress: Progress) -> None:
        self.block_while_paused(progress, self.between)

    def stops_after(self, progress: Progress) -> bool:
        return self.checkpointer.stops_after(progress)

    def cohort(self, kind: str, draw: Draw) -> Cohort:
        draws = 0

        def again(*, short: bool = False) -> Cohort:
            nonlocal draws
            draws += not short
            if draws > 1 and not short:  # the previous draw found too few devices
                self.allow_requests_while_waiting()
            return draw(short=short)

        return self.checkpointer.cohort(kind, again)

    def begin(self, nodes: Sequence[int]) -> None:
        self.checkpointer.begin(nodes)

    def accept(self, replies: Sequence[Message]) -> Sequence[Message]:
        return self.checkpointer.accept(replies)

    def discard(self, reply: Message) -> bool:
        return self.checkpointer.discard(reply)

    def advice(self, progress: Progress, reasons: Sequence[str]) -> Sequence[str]:
        return self.checkpointer.advice(progress, reasons)

    def fail(self, progress: Progress) -> None:
        self.checkpointer.fail(progress)
