"""Loops that are compiled for the processor they run on, by numba."""

from __future__ import annotations

import functools
import hashlib
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import numba

Function = TypeVar("Function", bound=Callable[..., Any])

unsigned: Any = numba.uint64  # as mypy takes it
"""Makes an index unsigned: of signed ones loops ask each time whether they count from the end."""

_PARTS = ("compiled.py", "im2col.py", "llvm.py")  # what loops of other files are made of, too


def compiled(
    signature: str, *, fastmath: set[str], shape: object = ()
) -> Callable[[Function], Function]:
    """A decorator that compiles a function for arguments of these types, at once.

    What comes of it is kept beside the source, or else in the user's cache folder, under a name
    that only this code has; where it can be neither kept nor read it is compiled again in each
    process.

    Args:
        signature: In numba's notation.
        fastmath: What LLVM may assume of floating-point numbers, by its own names.
        shape: Constants that the function is compiled with, if it is not the only one of its name:
            numba's own cache mixes such up when two processes write to it at once.
    """

    def made(function: Function) -> Function:
        # By NumPy's model of errors dividing by nought gives what it gives elsewhere.
        options: dict[str, Any] = {"fastmath": fastmath, "error_model": "numpy"}
        name = f"{function.__qualname__}_{_digest(inspect.getfile(function), repr(shape))}"
        function.__qualname__ = name
        try:
            cached = numba.njit(cache=True, **options)(function)
        except RuntimeError:  # no folder for the cache
            return cast(Function, numba.njit(signature, **options)(function))
        try:
            cached.compile(signature)
        except Exception:  # whatever comes of reading half a file, or of a full disk
            for left in Path(cached.stats.cache_path).glob(f"*{name.rpartition('.')[2]}*"):
                left.unlink(missing_ok=True)
            # Where it is the code that is wrong this says so.
            return cast(Function, numba.njit(signature, **options)(function))
        cached.disable_compile()
        return cast(Function, cached)

    return made


@functools.cache
def _digest(file: str, shape: str) -> str:
    """Of all that a function in a file is made of."""
    files = [Path(file), *(Path(__file__).with_name(part) for part in _PARTS)]
    content = b"".join(one.read_bytes() for one in files)
    return hashlib.sha256(content + shape.encode()).hexdigest()[:16]
