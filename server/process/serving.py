"""Freed memory goes back to the system, and what stays is not looked through for garbage."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

from server.process.heap import set_heap

_MAPPED_BYTES, _KEPT_BYTES = 2**19, 2**20


def give_back_early() -> None:
    """Has the C library map large blocks one by one, and unmap each when it is freed.

    glibc raises its own threshold with the first large block that is freed; from then on pieces of
    updates fill the heaps of several threads, which stay as large as they once were.
    """
    set_heap(mapped_bytes=_MAPPED_BYTES, kept_bytes=_KEPT_BYTES)


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
