"""Two-step handling of SIGINT and SIGTERM: the first asks to stop, the second insists."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NoReturn

from fedcore.errors import INTERRUPTED

StopRequested = Callable[[], bool]

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_AGAIN_S = 0.05  # the interpreter can raise again by then


@contextmanager
def stop_requested(say: Callable[[], None]) -> Iterator[StopRequested]:
    """Yields a function that returns whether SIGINT or SIGTERM arrived; a second one interrupts.

    Outside the main thread, which can't handle signals, existing handlers stay in place and the
    function returns False.

    Args:
        say: Callback at the first signal; runs in the signal handler.

    Raises:
        KeyboardInterrupt: at the second signal, from wherever the program is.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    here, came = threading.get_ident(), threading.Event()

    def handle(number: int, frame: FrameType | None) -> None:
        if came.is_set():
            raise KeyboardInterrupt
        came.set()
        say()

    def swallowed(lost: sys.UnraisableHookArgs) -> None:
        # The signal arrived while an object was being freed or a process forked, where nothing can
        # be raised: send it again.
        if issubclass(lost.exc_type, KeyboardInterrupt):
            threading.Timer(_AGAIN_S, signal.pthread_kill, [here, signal.SIGINT]).start()
        else:
            previous_hook(lost)

    previous_hook, sys.unraisablehook = sys.unraisablehook, swallowed
    kept = {each: signal.signal(each, handle) for each in _SIGNALS}
    try:
        yield came.is_set
    finally:
        for each, handler in kept.items():
            signal.signal(each, handler)
        sys.unraisablehook = previous_hook


@contextmanager
def interrupt_then_exit() -> Iterator[None]:
    """Makes the first SIGINT or SIGTERM raise, and the second end the process immediately.

    For third-party code, which may catch the interrupt.

    Raises:
        KeyboardInterrupt: at the first signal, from wherever the program is.
    """
    came = threading.Event()

    def handle(number: int, frame: FrameType | None) -> None:
        if came.is_set():
            exit_immediately()
        came.set()
        raise KeyboardInterrupt

    kept = {each: signal.signal(each, handle) for each in _SIGNALS}
    try:
        yield
    finally:
        for each, handler in kept.items():
            signal.signal(each, handler)


def exit_immediately() -> NoReturn:
    """Ends the process immediately, whatever its threads do, without any clean-up."""
    text = b"Interrupted: stopped at once; complete files are kept.\n"
    with suppress(OSError):
        os.write(2, text)  # not a stream: another thread may hold its lock
    os._exit(INTERRUPTED)


@contextmanager
def signals_blocked() -> Iterator[None]:
    """Blocks SIGINT and SIGTERM; they stay pending until the block ends.

    A process started inside inherits the block until it calls `unblock_signals`.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def unblock_signals() -> None:
    """Unblocks SIGINT and SIGTERM, in a process that has installed its handlers."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
