"""The open calls of a gRPC server on asyncio: few for each caller, and none that stays untaken.

gRPC's core bounds the calls of a connection, and not those of a caller, who may open connection
after connection. A caller that reads nothing of an answer (an HTTP/2 window of zero) would keep its
call, with a file or a buffer, for as long as its connection answers pings.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from fedcore.rpc.crowd import Address, address_of

TAKE_S = 60.0
"""Seconds that a caller may take for one message of an answer."""


class OpenCall:
    """One call: `sending` before each message of its answer, `sent` after it was taken."""

    def __init__(self, context: Any, clock: Callable[[], float]) -> None:
        """Starts with nothing to send."""
        self.peer = address_of(context.peer())
        """Address of the caller."""
        self._context, self._clock = context, clock
        self._waits_since_s: float | None = None
        self._ended = False

    def sending(self) -> None:
        """Notes that a message is about to be sent."""
        self._waits_since_s = self._clock()

    def sent(self) -> None:
        """Notes that the message was taken."""
        self._waits_since_s = None

    def waits_s(self) -> float:
        """Returns the seconds that the caller has taken for a message so far."""
        return 0.0 if self._waits_since_s is None else self._clock() - self._waits_since_s

    def end(self) -> bool:
        """Cancels the call; returns False if that was done before."""
        first, self._ended = not self._ended, True
        if first:
            self._context.cancel()
        return first


class OpenCalls:
    """The open calls of all callers. Use it from the server's event loop only."""

    def __init__(self, most_each: int, clock: Callable[[], float] = time.monotonic) -> None:
        """Starts without calls; each caller may have ``most_each``."""
        self._most_each, self._clock = most_each, clock
        self._of: dict[bytes, dict[OpenCall, None]] = {}

    @contextmanager
    def opened(self, caller: bytes, context: Any) -> Iterator[OpenCall]:
        """Yields a new call of a caller, which stays open until exit.

        If it is one too many, the caller's oldest is cancelled: a device whose network failed need
        not wait until its lost calls are noticed.
        """
        call, its = OpenCall(context, self._clock), self._of.setdefault(caller, {})
        its[call] = None
        if len(its) > self._most_each:
            any(one.end() for one in its)
        try:
            yield call
        finally:
            del its[call]
            if not its and self._of.get(caller) is its:
                del self._of[caller]

    def peers(self) -> set[Address]:
        """Returns the addresses from which calls are open."""
        return {call.peer for its in self._of.values() for call in its}

    def sweep(self) -> None:
        """Cancels the calls whose answer was not taken for `TAKE_S`."""
        for its in self._of.values():
            for call in its:
                if call.waits_s() > TAKE_S:
                    call.end()
