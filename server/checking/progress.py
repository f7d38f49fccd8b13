"""Progress of a step that takes long, with the time that remains."""

from __future__ import annotations

import time
from collections.abc import Callable

from fedcore.observability.patience import Reminder
from fedcore.observability.words import seconds_text

Tell = Callable[[str], None]


class StepProgress:
    """Reports how much of a step is done: after two seconds, and each time that this doubles."""

    def __init__(self, what: str, tell: Tell, clock: Callable[[], float] = time.monotonic) -> None:
        """Starts the step ``what``."""
        self._what, self._tell, self._clock = what, tell, clock
        self._began_s, self._reminder = clock(), Reminder(clock)

    def __call__(self, done: int, total: int) -> None:
        """Reports that ``done`` of ``total`` are done, if a report is due."""
        if self._reminder.due() is None:
            return
        spent_s = self._clock() - self._began_s
        left = f", about {seconds_text(spent_s * (total - done) / done)} left" if done else ""
        self._tell(f"{self._what}: {done:,} of {total:,} looked at{left}")
