"""Normal numbers by a compiled loop, against the definition in wider arithmetic."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from fedcore.kernels.normal import add_normals
from fedcore.seeds import numpy_rng

Words = NDArray[np.uint64]
EDGES = [0, 1, 2**52, 2**53 + 1, 2**60, 2**61 - 1, 2**61, 2**61 + 1, 2**62, 2**63 - 1, 2**63]
EDGES += [2**63 + 2**61, 2**64 - 2**61, 3 * 2**62, 2**64 - 1]


def words(count: int, seed: int) -> Words:
    rng = numpy_rng(seed)
    drawn = rng.integers(0, 2**64, count, dtype=np.uint64)
    small = drawn[: count // 4] >> rng.integers(0, 64, count // 4, dtype=np.uint64)  # far tails
    return np.concatenate([np.array(EDGES * 2, np.uint64), small, drawn])


def wide(angles: Words, radii: Words) -> tuple[NDArray[np.longdouble], NDArray[np.longdouble]]:
    """Both numbers of each pair, of standard deviation 1."""
    uniform = (radii & np.uint64(2**63 - 1)).astype(np.longdouble) + np.longdouble(0.5)
    radius = np.sqrt(-2 * (np.log(uniform) - 63 * np.log(np.longdouble(2))))
    turn = angles.astype(np.int64).astype(np.longdouble) * np.longdouble(2) ** -63
    pi = np.longdouble("3.14159265358979323846264338327950288")
    return radius * np.cos(pi * turn), radius * np.sin(pi * turn)


@pytest.mark.skipif(np.finfo(np.longdouble).nmant < 63, reason="no wider numbers to compare with")
@pytest.mark.parametrize("deviation", [1.0, 0.37, 1e-6, 4096.0])
def test_numbers_are_within_a_few_units_in_the_last_place(deviation: float) -> None:
    angles, radii = words(20_000, 1), words(20_000, 2)
    found = np.zeros((2, len(angles)))
    first, second = found
    add_normals(angles, radii, first, second, deviation, 0.0)
    right = np.stack(wide(angles, radii)) * np.longdouble(deviation)
    size = np.hypot(*right.astype(np.float64))
    # Of 1 - 2**-54 and the like nothing is left but the rounding of float64 itself.
    tolerated = 2.0**-51 * size + 2.0**-53 / np.maximum(size / deviation, 1e-8) * deviation
    assert (np.abs(found - right) <= tolerated).all()


@pytest.mark.parametrize("count", [1, 2, 7, 16, 1001])
@pytest.mark.parametrize("less", [0, 1])
def test_each_sum_gets_its_own_number_on_the_grid(count: int, less: int) -> None:
    step = 2.0**-30
    shift = 1.5 * 2.0**52 * step
    rng = numpy_rng(3)
    angles, radii = (rng.integers(0, 2**64, count, dtype=np.uint64) for _ in range(2))
    sums = rng.normal(size=2 * count - less)
    found = sums.copy()
    add_normals(angles, radii, found[:count], found[count:], 2.0, shift)
    alone = np.zeros(2 * count - less)
    add_normals(angles, radii, alone[:count], alone[count:], 2.0, shift)
    for one in (found, alone):
        assert np.array_equal(one / step, np.rint(one / step))
    assert np.array_equal(found, np.rint(sums / step) * step + alone)
    assert len(np.unique(alone)) == len(alone)
