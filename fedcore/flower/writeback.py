"""Has the system write out early what is to be durable later, so that nobody waits long for it.

A hint, and nothing else: who needs bytes to be durable syncs their file, and learns there of each
error. What is asked for here neither waits for the disk nor takes note of an error, which would
then be hidden from who syncs.
"""

from __future__ import annotations

import ctypes
import os
import queue
import threading
from collections.abc import Callable

_WRITE = 2  # SYNC_FILE_RANGE_WRITE of linux/fs.h
_MOST_WAITING = 64
"""Each holds a descriptor. On a disk that is slower than the network hints lead to nothing."""
_Ask = Callable[[int, int, int], int]


class Writeback:
    """Asks for what it is given in a thread of its own: a slow disk holds up nobody else.

    May be called from any thread.
    """

    def __init__(self) -> None:
        self._ask = _ask_of_system()
        self._waiting: queue.SimpleQueue[tuple[int, int, int] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def begin(self, descriptor: int, start: int, count: int) -> None:
        """Has ``count`` bytes of a file from ``start`` on written out; closes ``descriptor``."""
        if self._ask is None or self._waiting.qsize() >= _MOST_WAITING:
            os.close(descriptor)
            return
        with self._lock:
            if self._thread is None:
                # A daemon: it may wait for a disk that hangs, and nobody is to wait for it then.
                self._thread = threading.Thread(target=self._work, name="writeback", daemon=True)
                self._thread.start()
            self._waiting.put((descriptor, start, count))

    def close(self) -> None:
        """Ends the thread, once it has asked for everything; a later `begin` starts another."""
        with self._lock:
            if self._thread is not None:
                self._waiting.put(None)
                self._thread = None

    def _work(self) -> None:
        assert self._ask is not None
        while (one := self._waiting.get()) is not None:
            self._ask(*one)
            os.close(one[0])


def _ask_of_system() -> _Ask | None:
    """What has a part of a file written out and returns at once; None where there is no such."""
    found = getattr(ctypes.CDLL(None), "sync_file_range", None)
    if found is None:
        return None
    found.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)

    def ask(descriptor: int, start: int, count: int) -> int:
        return int(found(descriptor, start, count, _WRITE))

    return ask
