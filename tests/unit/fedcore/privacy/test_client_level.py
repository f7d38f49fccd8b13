"""What a client sends under client-level privacy, and what a server takes."""

from __future__ import annotations

import numpy as np
import pytest

from fedcore.config.run import Privacy
from fedcore.errors import InvalidUpdate
from fedcore.privacy.client_level import Bound, bounded, clip, distance
from fedcore.updates.messages import EPSILON, TRAIN_LOSS, UNCLIPPED, Instruction
from fedcore.updates.pack import Vector

PRIVACY = Privacy.model_validate({"unit": "client"})
ADAPTIVE = Privacy.model_validate({"unit": "client", "client": {"clip_norm": "adaptive"}})


def vector(*values: float) -> Vector:
    return np.array(values, np.float32)


def instruction(start: Vector, clip_norm: float = 1.0) -> Instruction:
    return Instruction(3, start, "layout", b"", 0.0, clip_norm)


def test_an_update_within_its_bound_is_sent_as_it_is() -> None:
    trained = vector(0.3, 0.4)
    found = clip(vector(0, 0), trained, 0.5001)
    assert found.weights is trained
    assert found.unclipped


def test_a_longer_one_is_moved_straight_towards_where_it_began() -> None:
    start = vector(1, 1, 1)
    found = clip(start, vector(4, 5, 1), 1.0)
    assert found.weights == pytest.approx([1.6, 1.8, 1.0])
    assert not found.unclipped
    assert 0.999999 < distance(start, (found.weights,)) <= 1.0


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_counts_as_nothing_learnt(value: float) -> None:
    start = vector(1, 2)
    assert clip(start, vector(value, 2), 1.0).weights.tolist() == start.tolist()


def test_a_bound_below_the_step_of_float32_gives_the_start_weights() -> None:
    start = vector(1e6, 1e6)
    assert clip(start, vector(1e6 + 1, 1e6), 1e-6).weights.tolist() == start.tolist()


def test_the_distance_does_not_depend_on_how_the_weights_come() -> None:
    rng = np.random.default_rng(0)
    start, other = rng.normal(size=(2, 200_000)).astype(np.float32)
    exact = float(np.linalg.norm(other.astype(np.float64) - start))
    assert distance(start, (other,)) == pytest.approx(exact, rel=1e-12)
    assert distance(start, (other[:7], other[7:])) == pytest.approx(exact, rel=1e-12)


@pytest.mark.parametrize("value", [3e38, float("nan"), float("inf"), 1.00001])
def test_the_server_refuses_an_update_over_the_bound_and_names_it(value: float) -> None:
    bound = Bound(vector(0, 0), 1.0, adaptive=False)
    bound.check((vector(1, 0),), {}, where="update from node 7")
    with pytest.raises(InvalidUpdate, match=r"^update from node 7: its distance is .*"):
        bound.check((vector(value, 0),), {}, where="update from node 7")


@pytest.mark.parametrize("value", [None, 0.5, -1.0, 1e9])
def test_where_it_asks_for_a_bit_it_takes_nothing_else(value: float | None) -> None:
    bound = Bound(vector(0), 1.0, adaptive=True)
    bound.check((vector(0),), {UNCLIPPED: 1.0}, where="update")
    with pytest.raises(InvalidUpdate, match=r"unclipped = .* expected 0 or 1"):
        bound.check((vector(0),), {} if value is None else {UNCLIPPED: value}, where="update")


def test_neither_losses_nor_numbers_of_examples_leave() -> None:
    told = {TRAIN_LOSS: 0.25, EPSILON: 2.0}
    update = bounded(PRIVACY, instruction(vector(0, 0)), vector(3, 4), told)
    assert update.num_examples == 1
    assert update.metrics == {EPSILON: 2.0}
    assert update.weights == pytest.approx([0.6, 0.8])


@pytest.mark.parametrize(("length", "bit"), [(0.9, 1.0), (1.1, 0.0)])
def test_one_bit_says_whether_it_was_within_an_adaptive_bound(length: float, bit: float) -> None:
    update = bounded(ADAPTIVE, instruction(vector(0)), vector(length), {})
    assert update.metrics == {UNCLIPPED: bit}


@pytest.mark.parametrize("clip_norm", [0.0, float("inf"), float("nan")])
def test_a_server_that_names_no_bound_gets_nothing(clip_norm: float) -> None:
    with pytest.raises(InvalidUpdate, match="contains no bound for the update"):
        bounded(PRIVACY, instruction(vector(0), clip_norm), vector(1), {})
