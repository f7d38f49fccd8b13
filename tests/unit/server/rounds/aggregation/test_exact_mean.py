from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedcore.errors import InvalidUpdate
from fedcore.seeds import numpy_rng
from fedcore.updates.messages import joined, sendable
from fedcore.updates.pack import Vector
from server.rounds.aggregation.exact_mean import STEP, ExactMean

LARGE = (1 << 16) + 7  # more than one chunk


def vectors(count: int, size: int = LARGE) -> list[Vector]:
    rng = numpy_rng(0, "vectors")
    return [rng.standard_normal(size).astype(np.float32) for _ in range(count)]


def exact(updates: list[Vector], weights: list[int]) -> ExactMean:
    mean = ExactMean(len(updates[0]))
    for vector, weight in zip(updates, weights, strict=True):
        mean.add(vector, weight)
    return mean


def test_the_mean_weighs_each_update() -> None:
    mean = exact([np.array([1.0, -2.0], np.float32), np.array([4.0, 1.0], np.float32)], [2, 1])
    assert mean.mean().tolist() == [2.0, -1.0]
    assert (mean.weight, mean.count) == (3, 2)
    assert mean.mean().dtype == np.float32


def test_every_chunk_is_summed() -> None:
    updates, weights = vectors(5), [1, 20, 3, 40, 5]
    expected = np.average(np.stack(updates).astype(np.float64), axis=0, weights=weights)
    assert np.abs(exact(updates, weights).mean() - expected).max() <= 2**-23


def test_reversing_the_order_changes_no_bit_where_floats_would() -> None:
    updates, weights = vectors(8), list(range(1, 9))
    forwards = exact(updates, weights).mean()
    backwards = exact(updates[::-1], weights[::-1]).mean()
    assert forwards.tobytes() == backwards.tobytes()
    floats = [
        np.sum(np.stack(order), axis=0, dtype=np.float32) for order in (updates, updates[::-1])
    ]
    assert (floats[0] != floats[1]).any()


def test_parts_of_any_length_give_the_bits_of_the_whole() -> None:
    vector = vectors(1)[0]
    whole, parted = ExactMean(LARGE), ExactMean(LARGE)
    whole.add(vector, 3)
    parted.add_parts(lambda: np.split(vector, [1, 70, 40_000]), 3)
    assert whole.mean().tobytes() == parted.mean().tobytes()
    assert (parted.weight, parted.count) == (3, 1)


def test_what_is_not_finite_in_its_last_part_changes_nothing() -> None:
    mean = exact([np.ones(4, np.float32)], [1])
    for wrong in (np.inf, np.nan):
        parts = [np.full(3, 5, np.float32), np.array([wrong], np.float32)]
        with pytest.raises(InvalidUpdate, match="not finite"):
            mean.add_parts(lambda parts=parts: parts, 1)  # type: ignore[misc]
    assert mean.mean().tolist() == [1.0] * 4


def test_the_update_itself_is_left_alone() -> None:
    vector = vectors(1)[0]
    before = vector.copy()
    ExactMean(LARGE).add(vector, 3)
    assert np.array_equal(vector, before)


def test_a_thousand_updates_of_a_billion_examples_each_have_their_mean() -> None:
    rng = numpy_rng(0, "billions")
    updates = [rng.standard_normal(50).astype(np.float32) for _ in range(1000)]
    weights = [10**9 + int(more) for more in rng.integers(0, 1000, len(updates))]
    mean = exact(updates, weights)
    assert mean.weight == sum(weights)
    backwards = exact(updates[::-1], weights[::-1]).mean()
    assert mean.mean().tobytes() == backwards.tobytes()
    for column in range(50):
        real = sum(
            (
                Fraction(float(one[column])) * weight
                for one, weight in zip(updates, weights, strict=True)
            ),
            Fraction(0),
        ) / sum(weights)
        assert abs(Fraction(float(mean.mean()[column])) - real) <= abs(real) * Fraction(1, 2**23)


def test_a_value_of_1e20_leaves_the_others_as_they_are() -> None:
    huge = np.array([1e20, 1.0, 2.0, -1e20], np.float32)
    updates = [huge, *([np.ones(4, np.float32)] * 7), -huge]
    mean = exact(updates, [1] * 9)
    # Its own columns, too: what cancels leaves the sum of the others, as no float would.
    assert mean.mean().tolist() == [np.float32(7 / 9)] * 4
    orders = [mean.mean(), exact(updates[::-1], [1] * 9).mean()]
    assert orders[0].tobytes() == orders[1].tobytes()


def test_the_largest_of_all_numbers_has_its_mean() -> None:
    most = np.finfo(np.float32).max
    mean = exact([np.full(3, most, np.float32)] * 5, [2**31 - 1] * 5)
    assert mean.mean().tolist() == [most] * 3


def test_sums_that_stay_ordinary_take_eight_bytes_an_element() -> None:
    mean = exact(vectors(4), [1000] * 4)
    assert len(mean._limbs) == 1
    mean.add(np.full(LARGE, 1e12, np.float32), 1)
    assert len(mean._limbs) > 1


@pytest.mark.parametrize("peak", [1.0, 1e9, 1e30])
def test_leaving_one_out_changes_the_differences_by_its_own_term_alone(peak: float) -> None:
    base, *updates = vectors(6, 40)
    updates = [base + np.float32(0.01) * one for one in updates]
    base[7] = peak
    for place, one in enumerate(updates):
        one[7] = peak * (1 + place * 2**-20)
    whole = exact(updates, [1] * 5).differences(base)
    rest = exact(updates[1:], [1] * 4).differences(base)
    own = exact(updates[:1], [1]).differences(base)
    assert np.allclose(whole - rest, own, rtol=2**-40, atol=0)
    ordinary = np.arange(40) != 7
    assert ((whole - rest) == own)[ordinary].all()


def test_an_empty_model_has_an_empty_mean() -> None:
    mean = ExactMean(0)
    mean.add(np.zeros(0, np.float32), 4)
    assert mean.mean().shape == (0,)


@given(st.integers(0, 2**32 - 1), st.integers(1, 1000))
def test_what_is_taken_back_leaves_the_bits_that_were_there(seed: int, weight: int) -> None:
    rng = np.random.default_rng(seed)
    stays, goes = rng.standard_normal((2, 1000)).astype(np.float32)
    mean, alone = ExactMean(1000), ExactMean(1000)
    peaks = [float(np.abs(goes).max())]
    alone.add(stays, 3)
    mean.add(stays, 3)
    assert mean.has_room(peaks, weight)
    mean.add_parts(lambda: [goes], weight, peaks=peaks)
    mean.subtract(lambda: [goes], weight, peaks=peaks)
    assert (mean.weight, mean.count) == (alone.weight, alone.count)
    assert mean.mean().tobytes() == alone.mean().tobytes()
    assert mean._bounds == alone._bounds


def test_there_is_room_until_a_sum_would_take_more_memory() -> None:
    mean = ExactMean(10)
    assert mean.has_room([1.0], 10**6)
    assert not mean.has_room([3e38], 1)
    assert not mean.has_room([1.0], 2**30)
    vector, peak = np.full(10, 2.0**23, np.float32), 2.0**23
    taken = 0
    while mean.has_room([peak], 1):
        mean.add(vector, 1)
        taken += 1
    assert taken == 2**3 - 1
    assert len(mean._limbs) == 1


@pytest.mark.parametrize("most", [2.0**50, 2.0**51, 2.0**52, 2.0**53])
def test_products_are_rounded_to_even_however_large_they_are(most: float) -> None:
    """By one way or the other, about the place where the ways part."""
    halves = np.arange(-9, 10) / 2
    near = np.concatenate([halves, most / 4 + halves, most - halves, -most + halves])
    vector = near.astype(np.float32)
    mean = ExactMean(len(vector))
    mean.add((vector * np.float32(STEP)).astype(np.float32), 1)
    assert mean._limbs[0].tolist() == np.rint(vector.astype(np.float64)).astype(np.int64).tolist()


def test_a_mean_by_parts_is_the_same() -> None:
    mean = exact(vectors(3), [1, 2, 3])
    parts = [part.copy() for part in mean.mean_parts()]
    assert [len(part) for part in parts] == [1 << 16, 7]
    assert np.concatenate(parts).tobytes() == mean.mean().tobytes()
    means = joined(mean.mean_parts(), LARGE)
    assert means.tobytes() == mean.mean().tobytes()
    assert sendable(means).base is means.base  # not copied once more


def test_a_sum_whose_memory_was_touched_is_the_same() -> None:
    mean, (vector,) = ExactMean(LARGE), vectors(1)
    mean.touch()
    mean.add(vector, 3)
    assert mean.mean().tobytes() == exact([vector], [3]).mean().tobytes()
    with pytest.raises(AssertionError):
        mean.touch()
