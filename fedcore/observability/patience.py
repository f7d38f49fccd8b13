"""One line where a command would be silent for long: what it is at, once that shows."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from fedcore.observability.foreign import say

_AFTER_S = 3.0

FIRST_STEP = (
    "note: trying a first step. Torch loads its compiler with the first one of a process, which "
    "can take some ten seconds."
)
"""A dispatch mode and every optimiser import it, whether or not anything is compiled."""
LOADING = "note: loading torch and what else this needs."


@contextmanager
def told_if_slow(text: str, *, after_s: float = _AFTER_S) -> Iterator[None]:
    """Prints ``text`` on standard error if the work within takes longer than ``after_s`` seconds.

    Standard output stays what it is for: results, which a machine may read.
    """

    def tell() -> None:
        say(text, to=sys.stderr, flush=True)

    timer = threading.Timer(after_s, tell)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
