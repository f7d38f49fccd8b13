"""Ctrl-C that first asks, and then insists."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

Asked = Callable[[], bool]


@contextmanager
def asked_to_stop(say: Callable[[], None]) -> Iterator[Asked]:
    """Yields a function that tells whether SIGINT or SIGTERM came; the second one interrupts.

    Outside the main thread, where no signals arrive, they go on doing what they did.

    Args:
        say: Called at the first one, in the middle of whatever is going on.

    Raises:
        KeyboardInterrupt: at the second one, from wherever the program is.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    came = threading.Event()

    def handle(number: int, frame: FrameType | None) -> None:
        if came.is_set():
            raise KeyboardInterrupt
        came.set()
        say()

    kept = {each: signal.signal(each, handle) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield came.is_set
    finally:
        for each, handler in kept.items():
            signal.signal(each, handler)
