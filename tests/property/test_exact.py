from __future__ import annotations

import random
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedcore.errors import InvalidUpdate
from fedcore.updates.pack import Vector
from server.aggregation.exact import AddScaled, ExactMean
from server.simulation.sums import add_scaled

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


@given(UPDATES, st.floats(2.0**26, 2.0**126, width=32), st.sampled_from([1, -1]))
def test_what_is_out_of_range_is_refused_and_changes_nothing(
    updates: list[Update], value: float, sign: int
) -> None:
    mean = ExactMean(2)
    for first, second, weight in updates:
        mean.add(np.array([first, second], np.float32), weight)
    before, count, weight = mean.mean().tobytes(), mean.count, mean.weight
    with pytest.raises(InvalidUpdate, match="leave the range of exact sums"):
        mean.add(np.array([0, sign * value], np.float32), 1)
    assert (mean.mean().tobytes(), mean.count, mean.weight) == (before, count, weight)


@given(st.lists(st.floats(-(2.0**40), 2.0**40, width=32), min_size=1, max_size=20))
def test_a_sum_never_overflows(values: list[float]) -> None:
    mean, taken = ExactMean(1), Fraction(0)
    for value in values:
        try:
            mean.add(np.array([value], np.float32), 1)
        except InvalidUpdate:
            continue
        taken += Fraction(value)
    if mean.weight:
        expected = float(taken / mean.weight)
        assert mean.mean()[0] == pytest.approx(expected, rel=2**-22, abs=2**-35)


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
    assert mean.add_rows(rows, [update[2] for update in updates], add) == []
    assert mean.mean().tobytes() == mean_of(updates).tobytes()


@pytest.mark.parametrize("add", [None, add_scaled], ids=["numpy", "compiled"])
@given(
    updates=st.lists(
        st.tuples(st.floats(-(2.0**40), 2.0**40, width=32), WEIGHTS), min_size=1, max_size=9
    )
)
def test_rows_out_of_range_are_those_that_would_be_refused_alone(
    updates: list[tuple[float, int]], add: AddScaled | None
) -> None:
    alone, refused = ExactMean(1), []
    for place, (value, weight) in enumerate(updates):
        try:
            alone.add(np.array([value], np.float32), weight)
        except InvalidUpdate:
            refused.append(place)
    together = ExactMean(1)
    rows = np.array([[value] for value, _ in updates], np.float32)
    assert together.add_rows(rows, [weight for _, weight in updates], add) == refused
    assert (together.count, together.weight) == (alone.count, alone.weight)
    if alone.weight:
        assert together.mean().tobytes() == alone.mean().tobytes()


def test_sums_that_leave_the_range_together_are_not_merged() -> None:
    one, other = ExactMean(1), ExactMean(1)
    one.add(np.array([2.0**25], np.float32), 1)
    other.add(np.array([2.0**25], np.float32), 1)
    with pytest.raises(InvalidUpdate, match="leave the range of exact sums"):
        one.merge(other)
    assert one.mean()[0] == 2.0**25


@pytest.mark.parametrize("size", [1, 4096, 10_001])
def test_long_rows_give_the_bits_of_one_after_the_other_too(size: int) -> None:
    rng = np.random.default_rng(size)
    rows = rng.normal(size=(5, size)).astype(np.float32)
    weights = [1, 50, 3, 2**17, 7]
    alone, together, compiled = ExactMean(size), ExactMean(size), ExactMean(size)
    for row, weight in zip(rows, weights, strict=True):
        alone.add(row, weight)
    assert together.add_rows(rows, weights) == []
    assert compiled.add_rows(rows, weights, add_scaled) == []
    assert together.mean().tobytes() == alone.mean().tobytes()
    assert compiled.mean().tobytes() == alone.mean().tobytes()
