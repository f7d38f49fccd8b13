"""Measures the rate of rounds, the remaining time and the memory in use."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

_PROC = Path("/proc")
_AGAIN_S = 1.0  # between two measurements of the memory
_WEIGHT = 0.1  # of the latest round in the moving mean


class RoundPace:
    """Measures the rounds of one process."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._began_s = clock()
        self._round_s = 0.0
        self._rounds = 0
        self._looked_s = float("-inf")
        self._memory: int | None = None

    def after(self, seconds: float, cohort: int, left: int) -> dict[str, float | None]:
        """Returns figures for the event of a finished round.

        Args:
            seconds: Duration of the round.
            cohort: Number of clients selected.
            left: Number of rounds planned after it.

        Returns:
            ``elapsed_s`` since this object was created; ``clients_per_s`` and ``remaining_s`` (an
            upper bound if rounds may end early), both from a moving mean, and ``memory_bytes``
            (None if the system does not report it).
        """
        self._rounds += 1
        # The first round includes setup; the mean drops it once there is a second one.
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
    """Returns the resident memory of this process and its descendants; shared pages count in each.

    None on a system without ``/proc``.
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
        except OSError:  # the process has ended
            continue
    return total
