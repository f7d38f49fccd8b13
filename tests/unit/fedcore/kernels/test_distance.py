"""The compiled measure of a vector has the bits of NumPy's."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedcore.kernels.distance import SquaredDistance
from fedcore.updates import distance
from fedcore.updates.distance import _Squared
from fedcore.updates.pack import Vector

SIZES = st.integers(1, 300) | st.integers(2**15, 2**16) | st.just(2**16 - 32)


def vectors(size: int, seed: int) -> tuple[Vector, Vector]:
    rng = np.random.default_rng(seed)
    one, other = rng.standard_normal((2, size)).astype(np.float32)
    return one * np.float32(2.0) ** rng.integers(-40, 40, size).astype(np.float32), other


@given(SIZES, st.integers(0, 2**32 - 1))
def test_the_bits_are_those_of_numpy(size: int, seed: int) -> None:
    one, other = vectors(size, seed)
    assert SquaredDistance().measure(one, other) == _Squared().measure(one, other)


def test_numpy_sums_in_the_order_that_the_loop_does() -> None:
    one, other = vectors(50_001, 1)
    gaps = (one - other).astype(np.float64)
    assert SquaredDistance().measure(one, other)[0] == np.square(gaps).sum()


def test_views_of_bytes_that_are_not_aligned_are_measured_too() -> None:
    one, other = vectors(1001, 2)
    view = np.frombuffer(b"." + one.tobytes(), np.float32, offset=1)
    assert not view.flags.aligned
    assert SquaredDistance().measure(view, other) == _Squared().measure(one, other)


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf, 3e38])
@pytest.mark.parametrize("at", [0, 77, 1000])
def test_what_overflows_or_is_not_finite_has_no_finite_distance(wrong: float, at: int) -> None:
    one, other = vectors(1001, 3)
    one[at], other[at] = wrong, -3e38
    assert not np.isfinite(SquaredDistance().measure(one, other)[0])


@pytest.mark.parametrize("wrong", [None, np.nan, np.inf, 3e38])
def test_long_vectors_are_measured_with_the_same_result(
    wrong: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = vectors(100_003, 4)
    one[99_500:] = 3  # integers
    if wrong is not None:
        one[99_000], other[99_000] = wrong, -3e38
    found: list[object] = []
    for first in (2**22, 1):  # NumPy, and then compiled
        monkeypatch.setattr(distance, "COMPILED_FROM", first)
        try:
            parts = np.split(one, [65_504, 70_000])
            found.append(distance.measure(parts, other, floats=99_500, where="update"))
        except distance.InvalidUpdate as error:
            found.append(str(error))
    assert found[0] == found[1]
    assert isinstance(found[0], str) == (wrong is not None and not np.isfinite(wrong))


def test_a_vector_of_zeros_has_no_distance_and_no_peak() -> None:
    zeros = np.zeros(200, np.float32)
    assert SquaredDistance().measure(zeros, -zeros) == (0.0, 0.0)
