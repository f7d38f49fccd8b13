"""Freed memory goes back to the system."""

from __future__ import annotations

import ctypes

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
