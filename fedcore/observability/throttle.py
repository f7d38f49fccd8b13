"""Few lines of a kind, however often what they tell of happens: who causes them fills no log."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Generic, TypeVar

TOLD_S = 10.0
"""What a peer does again and again is told of once in so many seconds."""
TOLD_BURST = 20
"""So many lines of a kind that a peer causes are written at once; then one in `TOLD_S` seconds."""
_MOST_KINDS = 10_000

_Key = TypeVar("_Key")


def take_token(
    left: dict[_Key, tuple[float, float]], key: _Key, now_s: float, *, every_s: float, burst: int
) -> bool:
    """Takes a token out of the bucket of ``key``, which fills by one in ``every_s`` seconds.

    ``left`` holds for each key how many tokens there were, and when.
    """
    tokens, since_s = left.get(key, (float(burst), now_s))
    tokens = min(tokens + (now_s - since_s) / every_s, float(burst))
    left[key] = (tokens - 1.0 if tokens >= 1.0 else tokens, now_s)
    return tokens >= 1.0


class Throttle(Generic[_Key]):
    """Lets `burst` lines of a kind through at once, then one in a while, and counts the others."""

    def __init__(
        self,
        *,
        every_s: float = TOLD_S,
        burst: int = TOLD_BURST,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Begins with nothing left out."""
        self._every_s = every_s
        self._burst = burst
        self._clock = clock
        self._left: dict[_Key, tuple[float, float]] = {}
        self._silent: dict[_Key, int] = {}

    def admit(self, key: _Key) -> int | None:
        """Counts a line of the kind ``key``.

        Returns:
            How many were left out since the last one that was not; None where this one is.
        """
        if len(self._left) >= _MOST_KINDS and key not in self._left:
            self._left.clear()
            self._silent.clear()
        now_s = self._clock()
        if not take_token(self._left, key, now_s, every_s=self._every_s, burst=self._burst):
            self._silent[key] = self._silent.get(key, 0) + 1
            return None
        return self._silent.pop(key, 0)


def left_out(count: int) -> str:
    """What a line ends with that stands for others, too; empty where it does not."""
    return f" ({count} more since the last such line)" if count else ""
