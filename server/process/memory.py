"""Memory settings of a process: glibc's heap and the garbage collector under large data."""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_TRAINING_MAPPED_BYTES = 32 << 20  # glibc's maximum
_TRAINING_KEPT_BYTES = 512 << 20
_SERVING_MAPPED_BYTES, _SERVING_KEPT_BYTES = 2**19, 2**20


def reuse_large_blocks() -> None:
    """Makes glibc reuse blocks of up to 32 MiB instead of returning them to the system.

    Each training step allocates and frees its activations. If they go back to the system, the
    kernel clears every page again, which can take as long as the arithmetic.
    """
    _set_heap(mapped_bytes=_TRAINING_MAPPED_BYTES, kept_bytes=_TRAINING_KEPT_BYTES)


@contextmanager
def objects_frozen() -> Iterator[None]:
    """Excludes loaded objects from garbage collection, so that forked processes share them.

    torch and Flower create half a million objects, and each full collection visits all of them.
    What a program had excluded before stays excluded afterwards.
    """
    excluded_before = gc.get_freeze_count() > 0
    gc.freeze()
    try:
        yield
    finally:
        if not excluded_before:
            gc.unfreeze()


def return_freed_blocks() -> None:
    """Makes glibc map large blocks individually, and unmap each when it is freed.

    By default glibc raises its mmap threshold with the first large block that is freed. From then
    on pieces of updates, or gathered parts of a divided model, fill the heaps of several threads,
    which never shrink again.
    """
    _set_heap(mapped_bytes=_SERVING_MAPPED_BYTES, kept_bytes=_SERVING_KEPT_BYTES)


@contextmanager
def loading() -> Iterator[None]:
    """Disables garbage collection during imports, and excludes the imported objects afterwards.

    Modules consist of hundreds of thousands of objects. Scanning them repeatedly during import
    takes a fifth of a server's start-up time, and scanning them later stalls its threads.
    Where a program had disabled garbage collection, it stays disabled.
    """
    enabled_before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if enabled_before:
            gc.enable()


def _set_heap(*, mapped_bytes: int, kept_bytes: int) -> None:
    """Fixes two thresholds that glibc otherwise adapts; does nothing with other C libraries.

    Args:
        mapped_bytes: Blocks of at least this size are mapped individually, and unmapped when freed;
            at most 32 MiB.
        kept_bytes: Free memory at the top of a heap that the process keeps.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # musl has none
        mallopt(_M_MMAP_THRESHOLD, mapped_bytes)
        mallopt(_M_TRIM_THRESHOLD, kept_bytes)
