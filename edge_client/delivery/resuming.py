"""Goes on with a file where a connection broke off, and gives up where that leads nowhere."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

from fedcore.rpc.delivery import CHUNK_BYTES
from fedcore.rpc.jitter import spread_s

ATTEMPTS = 5
"""Failures in a row, without a chunk in between, after which a source counts as unreachable."""
PAUSE_S = 0.1
_LONGEST_PAUSE_S = 2.0


class Interrupted(Exception):
    """A call did not end as it should: another attempt may."""


def resumed(
    once: Callable[[int], Iterator[bytes]],
    offset: int,
    *,
    stop: threading.Event,
    unreachable: Callable[[Exception], Exception],
) -> Iterator[bytes]:
    """Yields a file from an offset on, over as many attempts as it takes.

    Guarantee:
        Each attempt but `ATTEMPTS` in a row has yielded at least a chunk of 16 KiB, so a source
        that sends nearly nothing is given up.

    Args:
        once: Yields the file from an offset on; raises `Interrupted` where it breaks off.
        offset: The first byte wanted.
        stop: Set to end waits between attempts early.
        unreachable: Returns the error to raise after too many failures.
    """
    failures = 0
    while True:
        before = offset
        try:
            for content in once(offset):
                offset += len(content)
                yield content
            return
        except Interrupted as error:
            failures = 0 if offset - before >= CHUNK_BYTES else failures + 1
            pause_s = spread_s(min(PAUSE_S * 2.0**failures, _LONGEST_PAUSE_S), 0.5, 1.0)
            if failures >= ATTEMPTS or stop.wait(pause_s):
                raise unreachable(error) from None
