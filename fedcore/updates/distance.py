"""Measures received weights in one pass: whether they are finite, and how far they moved."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedcore.errors import InvalidUpdate
from fedcore.finite import all_finite, largest_magnitude
from fedcore.updates.pack import LARGEST_WHOLE, Vector

_CHUNK = 1 << 16  # elements: float64 temporaries stay in the cache


COMPILED_FROM = 2**22
"""Length of vectors from which on a compiled loop measures them, or adds them up. The loops need
numba, whose import takes half a second and 105 MB. It should not be during a round."""


_Measured = Callable[[Vector, Vector], tuple[float, float]]


class _Squared:
    """Measures short vectors in buffers that are allocated once.

    If each call allocated memory, the kernel would map and zero it each time, which takes longer
    than the arithmetic.
    """

    def __init__(self) -> None:
        self._gap = np.empty(_CHUNK, np.float32)
        self._wide = np.empty(_CHUNK, np.float64)

    def measure(self, one: Vector, other: Vector) -> tuple[float, float]:
        """Returns the squared distance of two vectors, and the largest magnitude in ``one``."""
        return self.distance(one, other), largest_magnitude(one)

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


def _measured(size: int) -> _Measured:
    """Returns what measures short parts of a vector of ``size`` elements, compiled if it is long.

    Both ways give the same bits.
    """
    plain = _Squared().measure
    if size < COMPILED_FROM:
        return plain
    from fedcore.kernels.distance import SquaredDistance

    compiled = SquaredDistance().measure

    def measured(one: Vector, other: Vector) -> tuple[float, float]:
        found = compiled(one, other)
        return found if math.isfinite(found[0]) else plain(one, other)

    return measured


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
    measured = _measured(0 if base is None else len(base))
    with np.errstate(over="ignore", invalid="ignore"):  # non-finite values raise below
        for part in parts:
            first, own = min(max(0, floats - place), len(part)), list[float]()
            _check_integers(part[first:], where)
            compared = first if base is not None else 0
            for start in range(0, compared, _CHUNK):
                piece = part[start : min(start + _CHUNK, compared)]
                sent = base[place + start : place + start + len(piece)]  # type: ignore[index]
                squared, peak = measured(piece, sent)
                sums.append(squared)
                own.append(peak)
            if compared < len(part):
                own.append(largest_magnitude(part[compared:]))
            peaks.append(max(own) if all_finite(own) else math.nan)
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
