"""Limits repeated log lines, so that a peer that causes them cannot fill a log."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

from fedcore.observability.foreign import foreign

LOG_INTERVAL_S = 10.0
"""Seconds between two log lines about an event that a peer keeps causing."""
TOLD_BURST = 20
"""Lines of a kind from one peer that are written at once; then one in `LOG_INTERVAL_S` seconds."""
PEER_LINES = 100
"""Lines about one peer that are written at once, and in each day after that."""
MEMBER_LINES, STRANGER_LINES = 3000, 300
"""The same for all members together, and for all strangers, who cost an attacker nothing."""
SUMMARY_S = 3600.0
"""Seconds between two lines that count what was left out."""
_DAY_S = 86_400.0
_MAX_KINDS = 10_000
_NAMED = 3
"""Peers that a summary names, with their counts."""
_OTHERS = "others"

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


class DailyLines(Generic[_Key]):
    """Admits a number of lines of each key at once, and as many in each day after that."""

    def __init__(self, lines: int, clock: Callable[[], float] = time.monotonic) -> None:
        """Starts with full allowances."""
        self._lines = lines
        self._clock = clock
        self._left: dict[_Key, tuple[float, float]] = {}

    def admit(self, key: _Key) -> bool:
        """Counts a line of ``key``; returns whether to write it."""
        if len(self._left) >= _MAX_KINDS and key not in self._left:
            self._left.clear()
        every_s = _DAY_S / self._lines
        return take_token(self._left, key, self._clock(), every_s=every_s, burst=self._lines)


class Throttle(Generic[_Key]):
    """Admits `burst` lines of a kind at once, then one in a while, and counts the others."""

    def __init__(
        self,
        *,
        every_s: float = LOG_INTERVAL_S,
        burst: int = TOLD_BURST,
        clock: Callable[[], float] = time.monotonic,
        also: Callable[[_Key], bool] = lambda key: True,
    ) -> None:
        """Starts with full allowances.

        Args:
            every_s: Seconds between two lines of a kind in the long run.
            burst: Lines of a kind that are admitted at once.
            clock: Returns monotonic seconds.
            also: A further limit, asked for each line that these allow.
        """
        self._every_s = every_s
        self._burst = burst
        self._clock = clock
        self._also = also
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
        granted = take_token(
            self._left, key, self._clock(), every_s=self._every_s, burst=self._burst
        )
        if not granted or not self._also(key):
            self._silent[key] = self._silent.get(key, 0) + 1
            return None
        return self._silent.pop(key, 0)


class PeerLines:
    """A log's lines about peers, so few that no peer, and no crowd of them, can fill the log.

    `burst` lines of a kind about one peer are written at once, then one in `LOG_INTERVAL_S`; about
    one peer no more than `PEER_LINES` at once and as many a day after that, about all members
    `MEMBER_LINES`, and about all strangers `STRANGER_LINES`. A line says how many of its kind were
    left out before it, and once in `SUMMARY_S` a line counts all that were. Any thread may call it.
    """

    def __init__(
        self,
        write: Callable[[str], None],
        what: str,
        *,
        burst: int = TOLD_BURST,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Starts with full allowances.

        Args:
            write: Writes a line, which nothing in it may format.
            what: What the lines are about, for the summary, such as ``deliveries``.
            burst: Lines of a kind about one peer that are written at once.
            clock: Returns monotonic seconds.
        """
        self._write, self._what, self._clock = write, what, clock
        self._kinds: Throttle[tuple[str, bool, Hashable]] = Throttle(
            burst=burst, clock=clock, also=self._has_room
        )
        self._peers: DailyLines[str] = DailyLines(PEER_LINES, clock)
        self._members: DailyLines[None] = DailyLines(MEMBER_LINES, clock)
        self._strangers: DailyLines[None] = DailyLines(STRANGER_LINES, clock)
        self._left_out: Counter[str] = Counter()
        self._summed_s = clock()
        self._lock = threading.Lock()

    def tell(self, peer: str, kind: Hashable, line: str, *, member: bool) -> None:
        """Writes a line about ``peer``, unless there were too many.

        Args:
            peer: Name of a member, or address of a stranger.
            kind: What the line is of; lines of a kind are limited together.
            line: The line, fit to print.
            member: Whether the peer has proved to be a member.
        """
        with self._lock:
            silent = self._kinds.admit((peer, member, kind))
            if silent is None:
                full = len(self._left_out) >= _MAX_KINDS and peer not in self._left_out
                self._left_out[_OTHERS if full else peer] += 1
        if silent is not None:
            self._write(line + omitted_suffix(silent))
        self.summarise()

    def summarise(self) -> None:
        """Writes how many lines were left out in the last `SUMMARY_S`, if that time is over."""
        with self._lock:
            now_s, left_out = self._clock(), self._left_out
            if now_s - self._summed_s < SUMMARY_S:
                return
            self._summed_s, self._left_out = now_s, Counter()
        if not left_out:
            return
        most = ", ".join(
            f"{foreign(peer, 100)} {count}" for peer, count in left_out.most_common(_NAMED)
        )
        self._write(
            f"{self._what}: {left_out.total()} not logged one by one since the last summary, "
            f"of {len(left_out)} peers, most: {most}"
        )

    def _has_room(self, key: tuple[str, bool, Hashable]) -> bool:
        peer, member, _ = key
        group = self._members if member else self._strangers
        return self._peers.admit(peer) and group.admit(None)


def omitted_suffix(count: int) -> str:
    """Returns the end of a line that stands for omitted ones; empty if there are none."""
    return f" ({count} more of these since the last one was logged)" if count else ""
