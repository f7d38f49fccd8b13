from __future__ import annotations

import numpy as np
import pytest

from fedcore.errors import InvalidUpdate
from fedcore.seeds import numpy_rng
from fedcore.updates.pack import Vector
from server.aggregation.exact import ExactMean

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


def test_what_is_out_of_range_in_its_last_part_changes_nothing() -> None:
    mean = exact([np.ones(4, np.float32)], [1])
    for wrong in (2.0**26, np.nan):
        parts = [np.full(3, 5, np.float32), np.array([wrong], np.float32)]
        with pytest.raises(InvalidUpdate, match="leave the range"):
            mean.add_parts(lambda parts=parts: parts, 1)  # type: ignore[misc]
    assert mean.mean().tolist() == [1.0] * 4


def test_the_update_itself_is_left_alone() -> None:
    vector = vectors(1)[0]
    before = vector.copy()
    ExactMean(LARGE).add(vector, 3)
    assert np.array_equal(vector, before)


@pytest.mark.parametrize("value", [2.0**26, -(2.0**26), 3e38])
def test_a_value_out_of_range_is_refused_with_the_next_step(value: float) -> None:
    mean = exact([np.ones(3, np.float32)], [1])
    with pytest.raises(
        InvalidUpdate, match=r"magnitude .* at weight 1 .*lower client\.learning_ra"
    ):
        mean.add(np.array([0, value, 0], np.float32), 1)
    assert mean.mean().tolist() == [1.0, 1.0, 1.0]
    mean.add(np.full(3, 3, np.float32), 1)
    assert mean.mean().tolist() == [2.0, 2.0, 2.0]


def test_many_updates_are_refused_before_their_sum_overflows() -> None:
    mean, vector = ExactMean(1), np.array([2.0**20], np.float32)
    for _ in range(63):
        mean.add(vector, 1)
    with pytest.raises(InvalidUpdate):
        mean.add(vector, 1)
    assert mean.count == 63
    assert mean.mean()[0] == 2.0**20


def test_an_empty_model_has_an_empty_mean() -> None:
    mean = ExactMean(0)
    mean.add(np.zeros(0, np.float32), 4)
    assert mean.mean().shape == (0,)
