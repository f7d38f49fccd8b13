"""A device that is told to stop does so, whatever it is at and whatever its server does."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from fedcore.errors import INTERRUPTED

log = logging.getLogger("fedcore.device")

_STOP_S = 4.0
"""How long a device may take over it; what it keeps is whole at any moment."""
_TELL_S = 0.5


@contextmanager
def told_to_stop(loading: threading.Event) -> Iterator[Callable[[], bool]]:
    """Yields a function that tells whether SIGINT or SIGTERM came.

    The first one interrupts what is going on, and ends the process with exit code 0 after a few
    seconds if that did not: imports and finalizers swallow interrupts, threads of a task outlive
    them. The second one ends it at once, with exit code 130. So does the first, with 0, while
    ``loading`` is set: an interrupt in the midst of torch's import would abort the process.

    Outside the main thread, where no signals arrive, they go on doing what they did.

    Raises:
        KeyboardInterrupt: at the first one, from wherever the program is.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    came, over = threading.Event(), threading.Event()

    def insist() -> None:
        came.wait()
        if not over.wait(_STOP_S):
            text = f"stopped: what it was at did not end within {_STOP_S:.0f} s"
            # Beside: what it was at may be a log that nobody reads.
            telling = threading.Thread(target=log.warning, args=[text], daemon=True)
            telling.start()
            telling.join(_TELL_S)
            os._exit(0)

    def handle(number: int, frame: FrameType | None) -> None:
        if came.is_set():
            os._exit(INTERRUPTED)
        came.set()
        if loading.is_set():
            os._exit(0)
        raise KeyboardInterrupt

    # Begun here: a handler that starts a thread may find the lock for that held by what it broke.
    threading.Thread(target=insist, name="stop", daemon=True).start()
    kept = {each: signal.signal(each, handle) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield came.is_set
    finally:
        if not came.is_set():  # else both hold until the process has ended
            over.set()
            came.set()
            for each, handler in kept.items():
                signal.signal(each, handler)
