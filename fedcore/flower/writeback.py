"""Starts writing file data to disk early, so that a later fsync takes less time.

Only a hint: code that needs durability must fsync, and learns of errors there. The hint does not
wait for the disk, and ignores errors, since consuming one would hide it from fsync.
"""

from __future__ import annotations

import ctypes
import os
import queue
import threading
from collections.abc import Callable

_WRITE = 2  # SYNC_FILE_RANGE_WRITE of linux/fs.h
_MAX_WAITING = 64
"""Most queued hints; each has a file descriptor. A disk slower than the network gains nothing."""
_Ask = Callable[[int, int, int], int]


class Writeback:
    """Issues write hints in a thread of its own, so that a slow disk does not block the caller.

    May be called from any thread.
    """

    def __init__(self) -> None:
        self._ask = _find_writeback_call()
        self._waiting: queue.SimpleQueue[tuple[int, int, int] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def begin(self, descriptor: int, start: int, count: int) -> None:
        """Requests the write of ``count`` bytes from ``start`` on; closes ``descriptor``."""
        if self._ask is None or self._waiting.qsize() >= _MAX_WAITING:
            os.close(descriptor)
            return
        with self._lock:
            if self._thread is None:
                # A daemon: a hanging disk may block it, and must not block the process's exit.
                thread = threading.Thread(target=self._work, name="writeback", daemon=True)
                try:
                    thread.start()
                except RuntimeError:  # the system has no thread to give; it is only a hint
                    os.close(descriptor)
                    return
                self._thread = thread
            self._waiting.put((descriptor, start, count))

    def close(self) -> None:
        """Ends the thread after its queued hints; a later `begin` starts another."""
        with self._lock:
            if self._thread is not None:
                self._waiting.put(None)
                self._thread = None

    def _work(self) -> None:
        assert self._ask is not None
        while (one := self._waiting.get()) is not None:
            self._ask(*one)
            os.close(one[0])


def _find_writeback_call() -> _Ask | None:
    """Returns a function that starts the write of a file's range; None if the system has none."""
    found = getattr(ctypes.CDLL(None), "sync_file_range", None)
    if found is None:
        return None
    found.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)

    def ask(descriptor: int, start: int, count: int) -> int:
        return int(found(descriptor, start, count, _WRITE))

    return ask
