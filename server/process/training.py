"""How a process that trains is set up with its system."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

from server.process.heap import set_heap

_MMAP_BYTES = 32 << 20  # the most that glibc takes
_TRIM_BYTES = 512 << 20


def keep_heap() -> None:
    """Has glibc reuse blocks of up to 32 MiB instead of returning each to the system.

    A step's activations are asked for and freed again and again; given back each time, every page
    of them is cleared again by the kernel, which can take as long as the arithmetic.
    """
    set_heap(mapped_bytes=_MMAP_BYTES, kept_bytes=_TRIM_BYTES)


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
