"""Notes on standard error while a command works silently for long, such as loading torch."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from fedcore.observability.foreign import say
from fedcore.observability.words import seconds_text

_AFTER_S = 3.0

FIRST_STEP = (
    "note: running a first step. Torch loads its compiler at the first step of a process, which "
    "can take about ten seconds."
)
"""Note for the first training step: dispatch modes and all optimisers import torch's compiler."""
LOADING = "note: loading torch and other libraries."


@contextmanager
def note_if_slow(text: str, *, after_s: float = _AFTER_S) -> Iterator[None]:
    """Prints ``text`` on standard error if the block takes longer than ``after_s`` seconds.

    Standard output is reserved for results, which a program may read.
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


class Reminder:
    """Decides when to repeat a note on a wait: each time that the wait has doubled.

    The first is due after `SILENT_S`, later ones at least once in `_REMIND_S`.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Starts the wait."""
        self._clock = clock
        self._began_s = clock()
        self._due_s = SILENT_S

    def due(self) -> float | None:
        """Returns the seconds waited so far, if a note is due; else None."""
        lasted_s = self._clock() - self._began_s
        if lasted_s < self._due_s:
            return None
        self._due_s = lasted_s + min(lasted_s, _REMIND_S)
        return lasted_s


SILENT_S = 2.0
"""Waits longer than this are reported."""
_REMIND_S = 60.0
_LOOK_S = 0.1
TORCH_MODULES = 3300
"""Approximate number of modules in a process that has loaded torch with its compiler and Flower."""


def _to_stderr(text: str) -> None:
    say(f"note: {text}", to=sys.stderr, flush=True)


@contextmanager
def report_loading(
    tell: Callable[[str], None] = _to_stderr, *, modules: int = TORCH_MODULES
) -> Iterator[None]:
    """Reports the progress of imports in the block, if they take longer than `SILENT_S`.

    Torch takes most of the time. The first import on a machine can take minutes, as Python compiles
    what it reads from a cold disk.

    Args:
        tell: Receives one line at a time, from another thread.
        modules: Approximate number of modules that the process will have loaded.
    """
    over, reminder = threading.Event(), Reminder()
    began_s, before = time.monotonic(), len(sys.modules)

    def watch() -> None:
        while not over.wait(_LOOK_S):
            if reminder.due() is not None:
                tell(_progress_text(time.monotonic() - began_s, before, len(sys.modules), modules))

    watching = threading.Thread(target=watch, name="loading", daemon=True)
    watching.start()
    try:
        yield
    finally:
        over.set()
        watching.join()


def _progress_text(lasted_s: float, before: int, now: int, expected: int) -> str:
    text = (
        f"loading torch and other libraries: {now} of about {max(expected, now)} modules in "
        f"{seconds_text(lasted_s)}"
    )
    if before < now < expected:
        text += f", about {seconds_text(lasted_s * (expected - now) / (now - before))} left"
    return f"{text}; the first start after installation takes longest"
