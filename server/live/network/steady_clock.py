"""The time of day as a server believes it: a clock that jumps for a moment ends nothing."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

log = logging.getLogger("fedcore.server")

APART_S = 60.0
"""The system's clock may differ by so much from what has passed since; more is a jump."""
BELIEVED_S = 600.0
"""A jump that has lasted for so long is taken for a clock that was set right."""


class SteadyClock:
    """The system's time, but for jumps: those are believed once they have lasted.

    Certificates and signatures run out by it. A clock that stands 100 days ahead for some seconds
    would put every device out. Safe to use from several threads.
    """

    def __init__(
        self,
        wall: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        """Begins with what the system says.

        Args:
            wall: Seconds since 1970 (UTC), as the system tells them.
            monotonic: Seconds that no setting of the clock moves.
        """
        self._wall = wall
        self._monotonic = monotonic
        self._lock = threading.Lock()
        self._ahead_s = wall() - monotonic()
        self._jumped_s: float | None = None

    def seconds(self) -> float:
        """Seconds since 1970 (UTC)."""
        with self._lock:
            now_s, passed_s = self._wall(), self._monotonic()
            steady_s = passed_s + self._ahead_s
            if abs(now_s - steady_s) <= APART_S:
                self._ahead_s, self._jumped_s = now_s - passed_s, None
                return now_s
            if self._jumped_s is None:
                self._jumped_s = passed_s
                log.warning(
                    "the system's clock has jumped by %.0f s; it is not believed for %.0f s",
                    now_s - steady_s,
                    BELIEVED_S,
                )
            if passed_s - self._jumped_s < BELIEVED_S:
                return steady_s
            log.warning("the system's clock is believed again, %.0f s away", now_s - steady_s)
            self._ahead_s, self._jumped_s = now_s - passed_s, None
            return now_s

    def __call__(self) -> datetime:
        """The same as a moment, UTC."""
        return datetime(1970, 1, 1, tzinfo=UTC) + timedelta(seconds=self.seconds())
