"""How fast rounds go, how long they will still take, and in how much memory."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

_PROC = Path("/proc")
_AGAIN_S = 1.0  # between two looks at the memory
_WEIGHT = 0.1  # of the latest round in the mean


class RoundPace:
    """Watches the rounds of one process go by."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._began_s = clock()
        self._round_s = 0.0
        self._rounds = 0
        self._looked_s = float("-inf")
        self._memory: int | None = None

    def after(self, seconds: float, cohort: int, left: int) -> dict[str, float | None]:
        """Figures for the event of a round that is over.

        Args:
            seconds: What it took.
            cohort: Clients that were asked.
            left: Rounds that are planned after it.

        Returns:
            ``elapsed_s`` since this began to watch; ``clients_per_s`` and ``remaining_s`` (an upper
            bound where rounds may end early), both from a moving mean, and ``memory_bytes`` (None
            where the system does not tell).
        """
        self._rounds += 1
        # The first one sets much up, and is forgotten once there is another.
        weight = max(_WEIGHT, 1 / max(1, self._rounds - 1))
        self._round_s += weight * (seconds - self._round_s)
        now_s = self._clock()
        if now_s - self._looked_s >= _AGAIN_S:
            self._looked_s, self._memory = now_s, memory_bytes()
        return {
            "elapsed_s": now_s - self._began_s,
            "clients_per_s": cohort / self._round_s if self._round_s else None,
            "remaining_s": left * self._round_s,
            "memory_bytes": self._memory,
        }


def memory_bytes() -> int | None:
    """Resident memory of this process and all below it; what they share counts in each.

    None where there is no ``/proc``.
    """
    if not _PROC.is_dir():
        return None
    page, total, processes = os.sysconf("SC_PAGE_SIZE"), 0, [str(os.getpid())]
    while processes:
        folder = _PROC / processes.pop()
        try:
            total += int((folder / "statm").read_text().split()[1]) * page
            for children in folder.glob("task/*/children"):
                processes += children.read_text().split()
        except OSError:  # it ended meanwhile
            continue
    return total
