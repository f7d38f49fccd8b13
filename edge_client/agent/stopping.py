"""Prompt shutdown of a device on SIGINT or SIGTERM, whatever its code or its server is doing."""

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
"""Time for a clean shutdown before the process exits; its files are consistent at any moment."""
_TELL_S = 0.5
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_OVER = b"\0"  # no signal has this number


@contextmanager
def stop_on_signals(
    loading: threading.Event, *, stopped: Callable[[], None] = lambda: None
) -> Iterator[Callable[[], bool]]:
    """Handles SIGINT and SIGTERM; yields a function that returns whether one was received.

    The first signal raises `KeyboardInterrupt`. If the process still runs a few seconds later, it
    exits with code 0: imports and finalizers swallow interrupts, a task's threads outlive them, and
    a long call into a library (a training step over many examples, a DNS lookup without an answer)
    runs no Python handler until it returns. A second signal exits at once with code 130. While
    ``loading`` is set, the first signal exits at once with code 0: an interrupt during torch's
    import would abort the process.

    Called outside the main thread, it changes nothing: only the main thread receives signals.

    Args:
        loading: Set by the caller while torch is imported.
        stopped: Called before the process exits here, not at the end of the block.

    Raises:
        KeyboardInterrupt: on the first signal, at any point of the main thread.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    came = threading.Event()

    def leave(code: int) -> None:
        stopped()
        os._exit(code)

    def handle(number: int, frame: FrameType | None) -> None:
        if came.is_set():
            leave(INTERRUPTED)
        came.set()
        if loading.is_set():
            leave(0)
        raise KeyboardInterrupt

    # Python runs handlers in the main thread, between two instructions. The wake-up descriptor
    # receives a signal's number at once, even while that thread is inside a library.
    heard, numbers = socket.socketpair()
    numbers.setblocking(False)
    before = signal.set_wakeup_fd(numbers.fileno(), warn_on_full_buffer=False)
    # Started here: in a handler, the interrupted code might hold the lock for starting threads.
    insisting = threading.Thread(
        target=_exit_if_late, args=[heard, loading, leave], name="stop", daemon=True
    )
    insisting.start()
    kept = {each: signal.signal(each, handle) for each in _SIGNALS}
    try:
        yield came.is_set
    finally:
        if not came.is_set():  # else handlers and thread stay in force until the process exits
            signal.set_wakeup_fd(before)
            for each, handler in kept.items():
                signal.signal(each, handler)
            numbers.send(_OVER)
            insisting.join()
            numbers.close()
            heard.close()


def _exit_if_late(
    heard: socket.socket, loading: threading.Event, leave: Callable[[int], None]
) -> None:
    """Exits the process `_STOP_S` after a signal, or at once on a second one."""
    if not _next(heard):
        return
    if loading.is_set():
        leave(0)
    heard.settimeout(_STOP_S)
    with suppress(TimeoutError):
        if _next(heard):
            leave(INTERRUPTED)
        return
    text = f"stopped: the work in progress did not end within {_STOP_S:.0f} s"
    # In another thread: the main thread may be blocked writing to a log that nobody reads.
    telling = threading.Thread(target=log.warning, args=[text], daemon=True)
    telling.start()
    telling.join(_TELL_S)
    leave(0)


def _next(heard: socket.socket) -> bool:
    """Waits for a signal; returns False when the handlers were removed and none can follow."""
    while number := heard.recv(1):
        if number[0] in _SIGNALS:
            return True
        if number == _OVER:
            break
    return False
