"""Measures received weights in one pass: whether they are finite, and how far they moved."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedcore.errors import InvalidUpdate
from fedcore.finite import all_finite, largest_magnitude
from fedcore.updates.pack import LARGEST_WHOLE, Vector

_CHUNK = 1 << 16  # elements: float64 temporaries stay in the cache


class _Squared:
    """Computes squared distances of short vectors in buffers that are allocated once.

    If each call allocated memory, the kernel would map and zero it each time, which takes longer
    than the arithmetic.
    """

    def __init__(self) -> None:
        self._gap = np.empty(_CHUNK, np.float32)
        self._wide = np.empty(_CHUNK, np.float64)

    def distance(self, one: Vector, other: Vector) -> float:
        """Returns the squared L2 distance of two float32 vectors of at most `_CHUNK` elements.

        Differences are rounded to float32; their squares and sums are float64. The result does not
        depend on any library's number of threads; it is not finite if a value is not.
        """
        gap, wide = self._gap[: len(one)], self._wide[: len(one)]
        np.subtract(one, other, out=gap)
        np.copyto(wide, gap)
        np.square(wide, out=wide)
        found = float(wide.sum())
        if math.isinf(found):  # the difference of two numbers may overflow float32
            np.subtract(one, other, out=wide, dtype=np.float64)
            np.square(wide, out=wide)
            found = float(wide.sum())
        return found


def measure(
    parts: Iterable[NDArray[Any]], base: Vector | None, *, floats: int, where: str
) -> tuple[float | None, Sequence[float]]:
    """Checks that all values are finite, and those after ``floats`` possible integers, in one pass.

    Returns:
        The L2 distance of the first ``floats`` values to ``base``, if given, and the largest
        magnitude in each part.

    Raises:
        InvalidUpdate: a value is not finite, or an integer is too large for any model.
    """
    sums: list[float] = []
    peaks: list[float] = []
    place = 0
    squared = _Squared()
    with np.errstate(over="ignore", invalid="ignore"):  # non-finite values raise below
        for part in parts:
            peaks.append(largest_magnitude(part))
            first = max(0, floats - place)
            _check_integers(part[first:], where)
            for start in range(0, min(first, len(part)) if base is not None else 0, _CHUNK):
                piece = part[start : min(start + _CHUNK, first)]
                sent = base[place + start : place + start + len(piece)]  # type: ignore[index]
                sums.append(squared.distance(piece, sent))
            place += len(part)
    # In float64 no sum of squares of finite float32 values overflows.
    if not all_finite(peaks):
        raise InvalidUpdate(
            f"{where}: it holds values that are not finite. It was not used; a lower "
            "client.learning_rate usually fixes this."
        )
    return (math.sqrt(math.fsum(sums)) if base is not None else None), peaks


def _check_integers(values: Vector, where: str) -> None:
    if len(values) and largest_magnitude(values) > LARGEST_WHOLE:
        raise InvalidUpdate(
            f"{where}: an integer of its state is above 2**24, which no model sends. It was not "
            "used."
        )
