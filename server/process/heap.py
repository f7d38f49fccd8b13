"""How the C library's heap deals with large blocks, set once for a process."""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h


def set_heap(*, mapped_bytes: int, kept_bytes: int) -> None:
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
