"""Ctrl-C that first asks, and then insists."""

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

Asked = Callable[[], bool]

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_AGAIN_S = 0.05  # by then the interpreter has left whatever cannot raise


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
    here, came = threading.get_ident(), threading.Event()

    def handle(number: int, frame: FrameType | None) -> None:
        if came.is_set():
            raise KeyboardInterrupt
        came.set()
        say()

    def swallowed(lost: sys.UnraisableHookArgs) -> None:
        # A signal that came while an object was freed or a process forked: nothing can be raised
        # from there, so it comes once more.
        if issubclass(lost.exc_type, KeyboardInterrupt):
            threading.Timer(_AGAIN_S, signal.pthread_kill, [here, signal.SIGINT]).start()
        else:
            told(lost)

    told, sys.unraisablehook = sys.unraisablehook, swallowed
    kept = {each: signal.signal(each, handle) for each in _SIGNALS}
    try:
        yield came.is_set
    finally:
        for each, handler in kept.items():
            signal.signal(each, handler)
        sys.unraisablehook = told


@contextmanager
def insistent() -> Iterator[None]:
    """Has SIGINT or SIGTERM interrupt, and the second one end the process there and then.

    For code of others, which may catch what interrupts it.

    Raises:
        KeyboardInterrupt: at the first one, from wherever the program is.
    """
    came = threading.Event()

    def handle(number: int, frame: FrameType | None) -> None:
        if came.is_set():
            end_at_once()
        came.set()
        raise KeyboardInterrupt

    kept = {each: signal.signal(each, handle) for each in _SIGNALS}
    try:
        yield
    finally:
        for each, handler in kept.items():
            signal.signal(each, handler)


def end_at_once() -> NoReturn:
    """Ends the process, whatever its threads do: nothing is put away."""
    told = b"Interrupted: ended at once; what was written whole stands.\n"
    with suppress(OSError):
        os.write(2, told)  # no stream: another thread may hold its lock
    os._exit(INTERRUPTED)


@contextmanager
def no_signal() -> Iterator[None]:
    """Keeps SIGINT and SIGTERM waiting.

    A process that is begun in here keeps them waiting, too, until it calls `signals_come`.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def signals_come() -> None:
    """Lets them through, in a process that has said what they do there."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
