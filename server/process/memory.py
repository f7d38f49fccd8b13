"""Memory of a process: how the C library's heap and the garbage collector deal with large data."""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_TRAINING_MAPPED_BYTES = 32 << 20  # the most that glibc takes
_TRAINING_KEPT_BYTES = 512 << 20
_SERVING_MAPPED_BYTES, _SERVING_KEPT_BYTES = 2**19, 2**20


def reuse_large_blocks() -> None:
    """Has glibc reuse blocks of up to 32 MiB instead of returning each to the system.

    A step's activations are asked for and freed again and again; given back each time, every page
    of them is cleared again by the kernel, which can take as long as the arithmetic.
    """
    _set_heap(mapped_bytes=_TRAINING_MAPPED_BYTES, kept_bytes=_TRAINING_KEPT_BYTES)


@contextmanager
def objects_frozen() -> Iterator[None]:
    """Spares the collector what is loaded already, and forked processes a copy of its pages.

    There are half a million objects of torch's and Flower's, and each full collection looks at all.
    """
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def return_freed_blocks() -> None:
    """Has the C library map large blocks one by one, and unmap each when it is freed.

    glibc raises its own threshold with the first large block that is freed; from then on pieces of
    updates fill the heaps of several threads, which stay as large as they once were.
    """
    _set_heap(mapped_bytes=_SERVING_MAPPED_BYTES, kept_bytes=_SERVING_KEPT_BYTES)


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


def _set_heap(*, mapped_bytes: int, kept_bytes: int) -> None:
    """Fixes what glibc would else adapt as it goes; elsewhere than with glibc nothing is done.

    Args:
        mapped_bytes: Blocks from this size on are mapped one by one, and unmapped when they are
            freed; glibc takes 32 MiB at most.
        kept_bytes: So much free memory at a heap's end stays with the process.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # musl has none
        mallopt(_M_MMAP_THRESHOLD, mapped_bytes)
        mallopt(_M_TRIM_THRESHOLD, kept_bytes)
