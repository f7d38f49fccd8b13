"""Rounds whose run operators steer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from flwr.app import Message

from server.rounds.checkpointing import Keeper, Progress


@dataclass(frozen=True)
class Steered:
    """A keeper whose run operators steer."""

    keeper: Keeper
    may_go_on: Callable[[Progress], bool]
    lacks_devices: Callable[[], None]
    """Called each time before a round that found too few devices looks for them again."""

    def goes_on(self, progress: Progress) -> bool:
        """What is over is kept first."""
        return self.keeper.goes_on(progress) and self.may_go_on(progress)

    def asked(self, kind: str, draw: Callable[[], list[int]]) -> list[int]:
        draws = 0

        def again() -> list[int]:
            nonlocal draws
            draws += 1
            if draws > 1:  # there were too few before
                self.lacks_devices()
            return draw()

        return self.keeper.asked(kind, again)

    def begin(self, nodes: Sequence[int]) -> None:
        self.keeper.begin(nodes)

    def accept(self, reply: Message) -> Message:
        return self.keeper.accept(reply)

    def discard(self, reply: Message) -> bool:
        return self.keeper.discard(reply)

    def failures(self, progress: Progress, reasons: Sequence[str]) -> Sequence[str]:
        return self.keeper.failures(progress, reasons)

    def fail(self, progress: Progress) -> None:
        self.keeper.fail(progress)
