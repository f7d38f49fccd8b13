"""A wall clock that ignores short jumps of the system's clock, for checks of expiry."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

log = logging.getLogger("fedcore.server")

APART_S = 60.0
"""Difference in seconds between wall and monotonic time above which the wall clock has jumped."""
BELIEVED_S = 600.0
"""Seconds after which a jump that persists is accepted as a correction of the clock."""


class SteadyClock:
    """The system's wall clock, except that a jump takes effect only once it has lasted 10 minutes.

    The expiry of certificates and signatures depends on it: a system clock that is 100 days ahead
    for some seconds would otherwise disconnect every device. Thread-safe.
    """

    def __init__(
        self,
        wall: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        """Starts with the system's current time.

        Args:
            wall: Returns the system's seconds since 1970 (UTC).
            monotonic: Returns seconds that changes to the system's clock do not affect.
        """
        self._wall = wall
        self._monotonic = monotonic
        self._lock = threading.Lock()
        self._ahead_s = wall() - monotonic()
        self._jumped_s: float | None = None

    def seconds(self) -> float:
        """Returns the seconds since 1970 (UTC)."""
        with self._lock:
            now_s, passed_s = self._wall(), self._monotonic()
            steady_s = passed_s + self._ahead_s
            if abs(now_s - steady_s) <= APART_S:
                self._ahead_s, self._jumped_s = now_s - passed_s, None
                return now_s
            if self._jumped_s is None:
                self._jumped_s = passed_s
                log.warning(
                    "the system clock jumped by %.0f s; it is ignored for %.0f s",
                    now_s - steady_s,
                    BELIEVED_S,
                )
            if passed_s - self._jumped_s < BELIEVED_S:
                return steady_s
            log.warning("the system clock is used again, now %.0f s off", now_s - steady_s)
            self._ahead_s, self._jumped_s = now_s - passed_s, None
            return now_s

    def __call__(self) -> datetime:
        """Returns the current time in UTC."""
        return datetime(1970, 1, 1, tzinfo=UTC) + timedelta(seconds=self.seconds())
