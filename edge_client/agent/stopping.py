"""A device that is told to stop does so, whatever it is at and whatever its server does."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from fedcore.errors import INTERRUPTED

log = logging.getLogger("fedcore.device")

_STOP_S = 4.0
"""How long a device may take over it; what it keeps is whole at any moment."""
_TELL_S = 0.5
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_OVER = b"\0"  # no signal has this number


@contextmanager
def told_to_stop(loading: threading.Event) -> Iterator[Callable[[], bool]]:
    """Yields a function that tells whether SIGINT or SIGTERM came.

    The first one interrupts what is going on, and ends the process with exit code 0 after a few
    seconds if that did not: imports and finalizers swallow interrupts, threads of a task outlive
    them, and one call into a library (a step of training over as many examples as a server asked
    for, a name that nobody resolves) lets no handler run until it returns. The second one ends it
    at once, with exit code 130. So does the first, with 0, while ``loading`` is set: an interrupt
    in the midst of torch's import would abort the process.

    Outside the main thread, where no signals arrive, they go on doing what they did.

    Raises:
        KeyboardInterrupt: at the first one, from wherever the program is.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    came = threading.Event()

    def handle(number: int, frame: FrameType | None) -> None:
        if came.is_set():
            os._exit(INTERRUPTED)
        came.set()
        if loading.is_set():
            os._exit(0)
        raise KeyboardInterrupt

    # Python's handlers run in the main thread, between two of its instructions. The number of a
    # signal is written here at once, wherever that thread is.
    heard, numbers = socket.socketpair()
    numbers.setblocking(False)
    before = signal.set_wakeup_fd(numbers.fileno(), warn_on_full_buffer=False)
    # Begun here: a handler that starts a thread may find the lock for that held by what it broke.
    insisting = threading.Thread(target=_insist, args=[heard, loading], name="stop", daemon=True)
    insisting.start()
    kept = {each: signal.signal(each, handle) for each in _SIGNALS}
    try:
        yield came.is_set
    finally:
        if not came.is_set():  # else both hold until the process has ended
            signal.set_wakeup_fd(before)
            for each, handler in kept.items():
                signal.signal(each, handler)
            numbers.send(_OVER)
            insisting.join()
            numbers.close()
            heard.close()


def _insist(heard: socket.socket, loading: threading.Event) -> None:
    """Ends the process some seconds after a signal, and at once at a second one."""
    if not _next(heard):
        return
    if loading.is_set():
        os._exit(0)
    heard.settimeout(_STOP_S)
    with suppress(TimeoutError):
        if _next(heard):
            os._exit(INTERRUPTED)
        return
    text = f"stopped: what it was at did not end within {_STOP_S:.0f} s"
    # Beside: what it was at may be a log that nobody reads.
    telling = threading.Thread(target=log.warning, args=[text], daemon=True)
    telling.start()
    telling.join(_TELL_S)
    os._exit(0)


def _next(heard: socket.socket) -> bool:
    """Waits for a signal; False where none is to be waited for any more."""
    while number := heard.recv(1):
        if number[0] in _SIGNALS:
            return True
        if number == _OVER:
            break
    return False
