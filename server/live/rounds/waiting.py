"""What is said while a round waits: for whom, since when, and for how long at most."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

from fedcore.observability.patience import Reminder
from fedcore.observability.words import counted, seconds_text

Tell = Callable[[str], None]
"""Takes a line of what is waited for."""
_NAMED = 5  # devices that a line names


@dataclass(frozen=True)
class Awaited:
    """Those whose replies a round waits for."""

    round: int
    kind: str
    """What they were asked for: to train, or to evaluate."""
    asked: int
    nodes: Collection[int]
    """Those who have not answered; fewer as they do."""
    end: float
    """When the round goes on without them, on the monotonic clock; infinite without an end."""
    reminder: Reminder = field(default_factory=Reminder)

    def remind(
        self, tell: Tell, *, name: Callable[[int], str], there: Callable[[], Collection[int]]
    ) -> None:
        """Tells of them, where it is time to.

        Args:
            tell: Takes the line.
            name: What a node is called.
            there: Gives the nodes that are connected now.
        """
        lasted_s = self.reminder.due()
        if lasted_s is None or not self.nodes:
            return
        here = set(there())
        named = [
            name(node) + ("" if node in here else " (not connected)")
            for node in sorted(self.nodes)[:_NAMED]
        ]
        more = len(self.nodes) - len(named)
        others = f" and {counted(more, 'other')}" if more > 0 else ""
        tell(
            f"round {self.round} ({self.kind}) waits for {', '.join(named)}{others}: "
            f"{self.asked - len(self.nodes)} of {self.asked} have answered, "
            f"{so_far(lasted_s, self.end)}"
        )


def so_far(lasted_s: float, end: float) -> str:
    """How long something has lasted, and how much longer it may, on the monotonic clock."""
    left_s = max(end - time.monotonic(), 0.0)
    most = f", {seconds_text(left_s)} left" if left_s < float("inf") else ""
    return f"{seconds_text(lasted_s)} so far{most}"
