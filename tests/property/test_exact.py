from __future__ import annotations

import random
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedcore.kernels.fixed_point import add_scaled
from fedcore.updates.pack import Vector
from server.rounds.aggregation.exact_mean import AddScaled, ExactMean

VALUES = st.floats(-50, 50, width=32) | st.floats(-(2.0**-20), 2.0**-20, width=32)
WEIGHTS = st.integers(1, 1000) | st.integers(1, 2**17)
UPDATES = st.lists(st.tuples(VALUES, VALUES, WEIGHTS), min_size=1, max_size=8)
Update = tuple[float, float, int]


def mean_of(updates: list[Update]) -> Vector:
    mean = ExactMean(2)
    for first, second, weight in updates:
        mean.add(np.array([first, second], np.float32), weight)
    return mean.mean()


@given(UPDATES, st.randoms(use_true_random=False))
def test_any_order_gives_the_same_bits(updates: list[Update], dice: random.Random) -> None:
    shuffled = dice.sample(updates, len(updates))
    assert mean_of(shuffled).tobytes() == mean_of(updates).tobytes()


@given(VALUES, VALUES, st.integers(1, 2**10), st.integers(1, 2**10))
def test_one_update_may_come_in_two_parts_where_no_bit_is_rounded(
    first: float, second: float, one: int, other: int
) -> None:
    # A multiple of 2**-12 times a whole weight is a multiple of 2**-36.
    first, second = (round(value * 2**12) / 2**12 for value in (first, second))
    split = [(first, second, one), (first, second, other)]
    assert mean_of(split).tobytes() == mean_of([(first, second, one + other)]).tobytes()


@given(UPDATES)
def test_the_error_stays_within_what_is_promised(updates: list[Update]) -> None:
    total = sum(weight for *_, weight in updates)
    for column, got in enumerate(mean_of(updates)):
        real = sum((Fraction(update[column]) * update[2] for update in updates), Fraction(0))
        real /= total
        promised = Fraction(1, 2**37) * len(updates) / total
        rounding = abs(real) * Fraction(1, 2**24) + Fraction(1, 2**149)  # to float32
        slack = 1 + Fraction(1, 2**20)  # the division before that rounds to float64
        assert abs(Fraction(float(got)) - real) <= (promised + rounding) * slack


@given(VALUES, WEIGHTS)
def test_the_mean_of_one_update_is_that_update_but_for_rounding(value: float, weight: int) -> None:
    assert mean_of([(value, -value, weight)])[0] == pytest.approx(value, rel=2**-23, abs=2**-36)


ANY = (
    st.floats(-(2.0**127), 2.0**127, width=32)
    | VALUES
    | st.sampled_from([2.0**26, -(2.0**26), float(np.float32(1e20)), 2.0**-149])
)
HEAVY = WEIGHTS | st.integers(2**29 - 3, 2**31 - 1)
ANY_UPDATES = st.lists(st.tuples(ANY, ANY, HEAVY), min_size=1, max_size=9)


def whole_of(updates: list[Update], column: int) -> int:
    """The sum in units of 2**-36, as whole numbers of Python tell it."""
    total = 0
    for update in updates:
        low = update[2] % 2**20 if update[2] > 2**29 else update[2]
        for weight in (low, update[2] - low):
            total += round(Fraction(update[column]) * weight * 2**36)  # to even, as NumPy does
    return total


@given(ANY_UPDATES, st.randoms(use_true_random=False), st.integers(1, 3))
def test_no_value_is_too_large_and_the_bits_are_those_of_whole_numbers(
    updates: list[Update], dice: random.Random, groups: int
) -> None:
    total = sum(weight for *_, weight in updates)
    expected = [
        np.float32(float(whole_of(updates, column)) / (total * 2.0**36)) for column in (0, 1)
    ]
    shuffled = dice.sample(updates, len(updates))
    merged = ExactMean(2)
    for group in range(groups):
        one = ExactMean(2)
        for first, second, weight in shuffled[group::groups]:
            one.add(np.array([first, second], np.float32), weight)
        merged.merge(one)
    rows = np.array([update[:2] for update in shuffled], np.float32)
    together, compiled = ExactMean(2), ExactMean(2)
    together.add_rows(rows, [update[2] for update in shuffled])
    compiled.add_rows(rows, [update[2] for update in shuffled], add_scaled)
    for mean in (merged, together, compiled):
        assert mean.mean().tobytes() == np.array(expected).tobytes()
    assert mean_of(updates).tobytes() == np.array(expected).tobytes()
    assert (merged.count, merged.weight) == (len(updates), total)


def test_a_million_large_updates_are_carried() -> None:
    mean, other = ExactMean(1), ExactMean(1)
    other.add_rows(np.full((1000, 1), 2.0**23, np.float32), [2**3] * 1000, add_scaled)
    for _ in range(1000):
        mean.merge(other)
    assert mean.count == 10**6
    assert mean.mean()[0] == 2.0**23


@given(st.lists(UPDATES, min_size=1, max_size=4))
def test_parts_that_are_merged_give_the_bits_of_the_whole(parts: list[list[Update]]) -> None:
    total = ExactMean(2)
    for part in parts:
        one = ExactMean(2)
        for first, second, weight in part:
            one.add(np.array([first, second], np.float32), weight)
        total.merge(one)
    whole = [update for part in parts for update in part]
    assert total.mean().tobytes() == mean_of(whole).tobytes()
    assert (total.count, total.weight) == (len(whole), sum(weight for *_, weight in whole))


@pytest.mark.parametrize("add", [None, add_scaled], ids=["numpy", "compiled"])
@given(updates=UPDATES)
def test_rows_give_the_bits_of_one_after_the_other(
    updates: list[Update], add: AddScaled | None
) -> None:
    rows = np.array([update[:2] for update in updates], np.float32)
    mean = ExactMean(2)
    mean.add_rows(rows, [update[2] for update in updates], add)
    assert mean.mean().tobytes() == mean_of(updates).tobytes()


@pytest.mark.parametrize("size", [1, 4096, 10_001])
def test_long_rows_give_the_bits_of_one_after_the_other_too(size: int) -> None:
    rng = np.random.default_rng(size)
    rows = rng.normal(size=(5, size)).astype(np.float32)
    weights = [1, 50, 3, 2**17, 7]
    alone, together, compiled = ExactMean(size), ExactMean(size), ExactMean(size)
    for row, weight in zip(rows, weights, strict=True):
        alone.add(row, weight)
    together.add_rows(rows, weights)
    compiled.add_rows(rows, weights, add_scaled)
    assert together.mean().tobytes() == alone.mean().tobytes()
    assert compiled.mean().tobytes() == alone.mean().tobytes()


@given(
    st.integers(3, 5000),
    st.integers(0, 2**32 - 1),
    st.lists(HEAVY, min_size=1, max_size=4),
    st.sampled_from([1.0, 2.0**20, 2.0**60]),
)
def test_compiled_sums_of_parts_have_the_bits_of_numpy(
    size: int, seed: int, weights: list[int], scale: float
) -> None:
    rng = np.random.default_rng(seed)
    weights = [weight % 2**17 + 1 for weight in weights] if scale == 1.0 else weights
    updates = rng.normal(scale=scale, size=(len(weights), size)).astype(np.float32)
    numpy, compiled = ExactMean(size), ExactMean(size, add_scaled)
    for update, weight in zip(updates, weights, strict=True):
        raw = update.tobytes()
        read = [np.frombuffer(raw[: size // 3 * 4], np.float32)]
        read += [np.frombuffer(raw, np.float32, offset=size // 3 * 4)]
        numpy.add(update, weight)
        compiled.add_parts(lambda read=read: read, weight)  # type: ignore[misc]
    assert compiled.mean().tobytes() == numpy.mean().tobytes()
    peaks = [float(np.abs(updates[0]).max())]
    if scale == 1.0:  # neither sum has a second limb
        for mean in (numpy, compiled):
            mean.subtract(lambda: updates[:1], weights[0], peaks=peaks)
        assert [limb.tobytes() for limb in compiled._limbs] == [
            limb.tobytes() for limb in numpy._limbs
        ]
