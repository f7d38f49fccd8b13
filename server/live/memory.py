"""Freed memory goes back to the system, and what stays is not looked through for garbage."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Iterator
from contextlib import contextmanager

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # from malloc.h
_MAPPED_BYTES, _KEPT_BYTES = 2**19, 2**20


def give_back_early() -> None:
    """Has the C library map large blocks one by one, and unmap each when it is freed.

    glibc raises its own threshold with the first large block that is freed; from then on pieces of
    updates fill the heaps of several threads, which stay as large as they once were. Elsewhere
    than with glibc nothing is done.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _MAPPED_BYTES)
        mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)


@contextmanager
def loading() -> Iterator[None]:
    """Around imports: nothing is garbage meanwhile, and what has come stays.

    Modules are hundreds of thousands of objects. To look through them again and again while they
    come in takes a fifth of the time in which a server starts, and a later look stops its threads.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
