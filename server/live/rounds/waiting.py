"""Progress messages while a round waits: for which devices, since when, and until when."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

from fedcore.observability.patience import Reminder
from fedcore.observability.words import counted, seconds_text

OnWait = Callable[[str], None]
"""Callback with a line that describes what the round waits for."""
_NAMED = 5  # devices listed by name in a line


@dataclass(frozen=True)
class Awaited:
    """The nodes whose replies a round waits for."""

    round: int
    kind: str
    """Type of the messages that they received: train or evaluate."""
    selected: int
    """Number of nodes selected, including those that have answered."""
    nodes: Collection[int]
    """Nodes that have not answered yet; a live view, which shrinks as they answer."""
    end: float
    """Deadline of the round on the monotonic clock, in seconds; infinite if it has none."""
    reminder: Reminder = field(default_factory=Reminder)

    def remind(
        self,
        on_wait: OnWait,
        *,
        name: Callable[[int], str],
        connected: Callable[[], Collection[int]],
    ) -> None:
        """Reports the outstanding nodes if a reminder is due.

        Args:
            on_wait: Callback with the line.
            name: Returns a node's name.
            connected: Returns the nodes that are connected now.
        """
        lasted_s = self.reminder.due()
        if lasted_s is None or not self.nodes:
            return
        here = set(connected())
        named = [
            name(node) + ("" if node in here else " (not connected)")
            for node in sorted(self.nodes)[:_NAMED]
        ]
        more = len(self.nodes) - len(named)
        others = f" and {counted(more, 'other')}" if more > 0 else ""
        on_wait(
            f"round {self.round} ({self.kind}) waits for {', '.join(named)}{others}: "
            f"{self.selected - len(self.nodes)} of {self.selected} have answered, "
            f"{elapsed_text(lasted_s, self.end)}"
        )


def names_text(names: Sequence[str]) -> str:
    """Lists the first names, and how many more there are."""
    more = len(names) - _NAMED
    others = f" and {counted(more, 'other')}" if more > 0 else ""
    return ", ".join(names[:_NAMED]) + others


def elapsed_text(lasted_s: float, end: float) -> str:
    """Formats the elapsed time and the time left until ``end``, in monotonic seconds."""
    left_s = max(end - time.monotonic(), 0.0)
    remaining = f", {seconds_text(left_s)} left" if left_s < float("inf") else ""
    return f"{seconds_text(lasted_s)} so far{remaining}"
