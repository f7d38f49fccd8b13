"""Loops that are compiled for the processor they run on, by numba."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba

Function = TypeVar("Function", bound=Callable[..., Any])


def compiled(signature: str, *, fastmath: set[str]) -> Callable[[Function], Function]:
    """A decorator that compiles a function for arguments of these types, at once.

    What comes of it is kept beside the source, or else in the user's cache folder; where neither
    can be written it is compiled anew in each process.

    Args:
        signature: In numba's notation.
        fastmath: What LLVM may assume of floating-point numbers, by its own names.
    """

    def made(function: Function) -> Function:
        # By NumPy's model of errors dividing by nought gives what it gives elsewhere.
        options: dict[str, Any] = {"fastmath": fastmath, "error_model": "numpy"}
        try:
            found = numba.njit(signature, cache=True, **options)(function)
        except RuntimeError:  # no folder for the cache
            found = numba.njit(signature, **options)(function)
        return cast(Function, found)

    return made
