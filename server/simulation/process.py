"""How a process that trains is set up with its system."""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_MMAP_BYTES = 32 << 20  # the most that glibc takes
_TRIM_BYTES = 512 << 20


def keep_heap() -> None:
    """Has glibc reuse blocks of up to 32 MiB instead of returning each to the system.

    A step's activations are asked for and freed again and again; given back each time, every page
    of them is cleared anew by the kernel, which can take as long as the arithmetic.
    """
    if not sys.platform.startswith("linux"):
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # musl has none
        libc.mallopt(_M_MMAP_THRESHOLD, _MMAP_BYTES)
        libc.mallopt(_M_TRIM_THRESHOLD, _TRIM_BYTES)


@contextmanager
def settled_objects() -> Iterator[None]:
    """Spares the collector what is loaded already, and forked processes a copy of its pages.

    There are half a million objects of torch's and Flower's, and each full collection looks at all.
    """
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
