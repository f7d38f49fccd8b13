"""A decorator that compiles a loop with numba for the host processor, and caches the result."""

from __future__ import annotations

import functools
import hashlib
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import numba
from numba.core import types
from numba.core.typing.templates import Signature

Function = TypeVar("Function", bound=Callable[..., Any])

unsigned: Any = numba.uint64  # Any, for mypy
"""Converts an index to unsigned. For signed indices, loops test each time for negative ones, which
count from the end."""


def read_only(kind: types.Type, dimensions: int = 1) -> types.Type:
    """Returns the type of a contiguous array that a loop only reads: also a view of bytes.

    Such views are read-only to NumPy, and need not be aligned.
    """
    return types.Array(kind, dimensions, "C", readonly=True, aligned=False)


_PARTS = ("compiled.py", "im2col.py", "llvm.py")  # shared by loops in other files


def compiled(
    signature: str | Signature, *, fastmath: set[str], shape: object = ()
) -> Callable[[Function], Function]:
    """Returns a decorator that compiles a function for these argument types immediately.

    The result is cached next to the source, or else in the user's cache folder, under a name
    derived from this code. Where the cache cannot be read or written, each process compiles again.

    Args:
        signature: In numba's notation, or of its types.
        fastmath: LLVM's names for the permitted floating-point assumptions.
        shape: Constants compiled into the function, if several functions share its name: numba's
            own cache confuses these when two processes write at once.
    """

    def made(function: Function) -> Function:
        # NumPy's error model: dividing by zero gives infinity or NaN instead of an exception.
        options: dict[str, Any] = {"fastmath": fastmath, "error_model": "numpy"}
        name = f"{function.__qualname__}_{_digest(inspect.getfile(function), repr(shape))}"
        function.__qualname__ = name
        try:
            cached = numba.njit(cache=True, **options)(function)
        except RuntimeError:  # no cache folder
            return cast(Function, numba.njit(signature, **options)(function))
        try:
            cached.compile(signature)
        except Exception:  # a truncated cache file, or a full disk, may raise anything
            for left in Path(cached.stats.cache_path).glob(f"*{name.rpartition('.')[2]}*"):
                left.unlink(missing_ok=True)
            # If the code itself is wrong, this raises the actual error.
            return cast(Function, numba.njit(signature, **options)(function))
        cached.disable_compile()
        return cast(Function, cached)

    return made


@functools.cache
def _digest(file: str, shape: str) -> str:
    """Returns a digest of all source code that a function in the file is compiled from."""
    files = [Path(file), *(Path(__file__).with_name(part) for part in _PARTS)]
    content = b"".join(one.read_bytes() for one in files)
    return hashlib.sha256(content + shape.encode()).hexdigest()[:16]
