"""Limits repeated log lines, so that a peer that causes them cannot fill a log."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Generic, TypeVar

LOG_INTERVAL_S = 10.0
"""Seconds between two log lines about an event that a peer keeps causing."""
TOLD_BURST = 20
"""Lines of a kind from one peer that are written at once; then one in `LOG_INTERVAL_S` seconds."""
_MAX_KINDS = 10_000

_Key = TypeVar("_Key")


def take_token(
    left: dict[_Key, tuple[float, float]], key: _Key, now_s: float, *, every_s: float, burst: int
) -> bool:
    """Takes a token from the bucket of ``key``, which gains one every ``every_s`` seconds.

    ``left`` maps each key to its last number of tokens and the time of that. Returns whether the
    bucket had a token; ``burst`` is its capacity.
    """
    tokens, since_s = left.get(key, (float(burst), now_s))
    tokens = min(tokens + (now_s - since_s) / every_s, float(burst))
    left[key] = (tokens - 1.0 if tokens >= 1.0 else tokens, now_s)
    return tokens >= 1.0


class Throttle(Generic[_Key]):
    """Admits `burst` lines of a kind at once, then one in a while, and counts the others."""

    def __init__(
        self,
        *,
        every_s: float = LOG_INTERVAL_S,
        burst: int = TOLD_BURST,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Starts with full allowances."""
        self._every_s = every_s
        self._burst = burst
        self._clock = clock
        self._left: dict[_Key, tuple[float, float]] = {}
        self._silent: dict[_Key, int] = {}

    def admit(self, key: _Key) -> int | None:
        """Counts a line of the kind ``key``.

        Returns:
            The number of lines left out since the last admitted one; None if this one is left out.
        """
        if len(self._left) >= _MAX_KINDS and key not in self._left:
            self._left.clear()
            self._silent.clear()
        now_s = self._clock()
        if not take_token(self._left, key, now_s, every_s=self._every_s, burst=self._burst):
            self._silent[key] = self._silent.get(key, 0) + 1
            return None
        return self._silent.pop(key, 0)


def omitted_suffix(count: int) -> str:
    """Returns the end of a line that stands for omitted ones; empty if there are none."""
    return f" ({count} more of these since the last one was logged)" if count else ""
