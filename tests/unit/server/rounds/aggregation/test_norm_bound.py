"""No update moves a round further than its bound, whatever order updates come in."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from flwr.app import Message, RecordDict

from fedcore.config.run import RunConfig
from fedcore.errors import ConfigError, InvalidUpdate
from fedcore.flower.identity import assume_identity
from fedcore.updates.messages import ARRAYS, MODEL, Update, update_content
from fedcore.updates.pack import Layout, Vector
from server.records import RoundRecord
from server.rounds.aggregation.exact_mean import ExactMean
from server.rounds.aggregation.norm_bound import (
    MAX_GROWTH,
    MEDIAN_FACTOR,
    NormBound,
    is_bounded,
    norm_bound,
)
from server.rounds.expected import update_spec
from server.rounds.inbound import Intake, Tally, accepted
from tests.unit.server.live.journal.journals import record
from tests.unit.server.rounds.aggregating import fold, hold

SIZE = 100_000
LAYOUT = Layout(("weight",), ((SIZE,),))
BASE = np.random.default_rng(0).standard_normal(SIZE).astype(np.float32)


@pytest.fixture(autouse=True)
def _identity() -> None:
    assume_identity(1)


def run_of(**federation: Any) -> RunConfig:
    return RunConfig.model_validate({"name": "run", "task": "t.py", "federation": federation})


def moved(length: float, seed: int) -> Vector:
    """Weights that are so far from the base."""
    way = np.random.default_rng(seed).standard_normal(SIZE)
    return (BASE + way * length / np.linalg.norm(way)).astype(np.float32)


def reply(node: int, weights: Vector) -> Message:
    asked = Message(RecordDict(), node, "train")
    return Message(update_content(Update(weights, 1, {})), reply_to=asked)


def taken(replies: list[Message], tally: Tally) -> Any:
    intake = Intake(update_spec(run_of(), LAYOUT), base=BASE)
    return accepted([replies], intake, tally, first=len(replies))


def mean_of(replies: list[Message], bound: NormBound | None) -> tuple[Vector, Tally]:
    tally = Tally(len(replies))
    mean = fold(taken(replies, tally), LAYOUT, tally, uniform=True, bound=bound)
    return mean.mean(), tally


def test_one_that_is_far_is_clipped_to_ten_medians_and_named() -> None:
    replies = [reply(node, moved(1.0, node)) for node in (1, 2, 3)]
    far = reply(4, moved(6.6e7, 4))
    mean, tally = mean_of([far, *replies], NormBound(BASE, None))
    (clipped,) = tally.clipped
    assert clipped == (4, pytest.approx(6.6e7, rel=1e-3))
    # Ten medians from one of four, and one each from the others, all in different directions.
    assert np.linalg.norm(mean - BASE) == pytest.approx(np.sqrt(MEDIAN_FACTOR**2 + 3) / 4, rel=0.05)


def test_the_order_of_arrival_shows_in_no_bit() -> None:
    vectors = [moved(length, seed) for seed, length in enumerate((1.0, 2.0, 300.0, 1e20))]
    found = {
        mean_of([reply(node, vectors[node]) for node in order], NormBound(BASE, None))[0].tobytes()
        for order in itertools.permutations(range(4))
    }
    assert len(found) == 1


def test_updates_are_added_up_before_all_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that none is read from the disk again, and nothing is left to be done at the end."""
    replies = [reply(node, moved(1.0, node)) for node in (1, 2, 3, 4)]
    counts = []
    add = ExactMean.add_parts

    def counted(self: ExactMean, *arguments: Any, **named: Any) -> None:
        add(self, *arguments, **named)
        counts.append((self.count, len(came)))

    came: list[Message] = []
    arriving = (came.append(each) or [each] for each in replies)
    monkeypatch.setattr(ExactMean, "add_parts", counted)
    tally = Tally(4)
    intake = Intake(update_spec(run_of(), LAYOUT), base=BASE)
    fold(
        accepted(arriving, intake, tally, first=4),
        LAYOUT,
        tally,
        uniform=True,
        bound=NormBound(BASE, None),
    )
    assert counts == [(1, 1), (2, 2), (3, 3), (4, 4)]


def test_what_would_take_more_memory_waits_for_its_bound() -> None:
    """One device with 1e30 everywhere may not have the server hold five sums instead of one."""
    far = [reply(node, np.full(SIZE, 1e30, np.float32)) for node in (1, 2)]
    tally = Tally(7)
    replies = [*far, *(reply(node, moved(1.0, node)) for node in (3, 4, 5, 6, 7))]
    mean = fold(taken(replies, tally), LAYOUT, tally, uniform=True, bound=NormBound(BASE, None))
    assert len(tally.clipped) == 2
    assert len(mean._limbs) == 1


def test_updates_of_usual_length_are_left_as_they_are() -> None:
    replies = [reply(node, moved(length, node)) for node, length in enumerate((1.0, 1.0, 9.9))]
    bounded, tally = mean_of(replies, NormBound(BASE, None))
    assert not tally.clipped
    assert bounded.tobytes() == mean_of(replies, None)[0].tobytes()


@pytest.mark.parametrize("count", [1, 2])
def test_among_fewer_than_three_nobody_is_clipped(count: int) -> None:
    replies = [reply(node, moved(1e6 if node else 1.0, node)) for node in range(count)]
    assert not mean_of(replies, NormBound(BASE, None))[1].clipped


def test_where_most_change_nothing_the_shortest_of_two_others_is_the_measure() -> None:
    still = [reply(node, BASE) for node in (1, 2, 3)]
    two = [reply(4, moved(1.0, 4)), reply(5, moved(1e30, 5))]
    mean, tally = mean_of([*still, *two], NormBound(BASE, None))
    assert [node for node, _ in tally.clipped] == [5]
    assert np.linalg.norm(mean - BASE) < MEDIAN_FACTOR
    mean, tally = mean_of([*still, two[1]], NormBound(BASE, None))  # alone, it tells nothing
    assert [node for node, _ in tally.clipped] == [5]
    assert np.abs(mean - BASE).max() <= 2.0**-36


def test_a_bound_that_is_fixed_holds_for_one_alone() -> None:
    mean, tally = mean_of([reply(1, moved(100.0, 1))], NormBound(BASE, 2.5))
    assert np.linalg.norm(mean - BASE) == pytest.approx(2.5, rel=1e-3)
    assert [node for node, _ in tally.clipped] == [1]


def test_what_is_held_for_a_strategy_is_clipped_too() -> None:
    replies = [reply(node, moved(1e30 if node == 3 else 1.0, node)) for node in (1, 2, 3, 4)]
    tally = Tally(4)
    held = hold(taken(replies, tally), tally, uniform=True, bound=NormBound(BASE, None))
    lengths = [
        np.linalg.norm(message.content[ARRAYS][MODEL].numpy() - BASE)  # type: ignore[index, union-attr]
        for message in held
    ]
    assert lengths == pytest.approx([1.0, 1.0, 10.0, 1.0], rel=1e-2)
    assert [node for node, _ in tally.clipped] == [3]


def test_the_largest_of_all_updates_is_clipped() -> None:
    most = np.full(SIZE, np.finfo(np.float32).max, np.float32)
    replies = [reply(1, most), *(reply(node, moved(1.0, node)) for node in (2, 3, 4))]
    mean, _ = mean_of(replies, NormBound(BASE, None))
    assert np.linalg.norm(mean - BASE) < 3.0


@pytest.mark.parametrize(
    ("federation", "live", "expected"),
    [
        ({}, True, True),
        ({}, False, False),
        ({"max_update_norm": 3.0}, False, True),
        ({"max_update_norm": "none"}, True, False),
    ],
)
def test_devices_are_bounded_unless_the_run_says_otherwise(
    federation: dict[str, Any], live: bool, expected: bool
) -> None:
    run = run_of(**federation)
    assert is_bounded(run, live=live) == expected
    assert (norm_bound(run, BASE, live=live) is not None) == expected


def test_client_level_privacy_has_a_bound_of_its_own() -> None:
    run = RunConfig.model_validate({"name": "run", "task": "t.py", "privacy": {"unit": "client"}})
    assert not is_bounded(run, live=True)


@pytest.mark.parametrize("wrong", ["0", "-1.0", "1e13", "'clip'", "nan"])
def test_a_bound_that_is_none_is_refused(tmp_path: Any, wrong: str) -> None:
    from fedcore.config.settings import load_run

    path = tmp_path / "run.toml"
    path.write_text(f"name = 'run'\ntask = 't.py'\n[federation]\nmax_update_norm = {wrong}\n")
    with pytest.raises(ConfigError, match=r"federation\.max_update_norm"):
        load_run(path)


def test_the_note_names_the_first_of_many() -> None:
    said = NormBound(BASE, None).note(3, [(f"client 'edge-{place}'", 1e9) for place in range(8)])
    assert said.startswith("round 3: 8 updates longer than 10 times the median of the round")
    assert "client 'edge-0' (1e+09)" in said
    assert "edge-7" not in said


def after(*measures: float | None) -> NormBound:
    """The bound of the round after rounds that counted so much as their medians."""
    records: list[RoundRecord] = [
        replace(record(number), median_norm=each) for number, each in enumerate(measures, 1)
    ]
    bound = norm_bound(run_of(), BASE, live=True, records=records)
    assert bound is not None
    return bound


def test_a_round_counts_for_twice_the_median_of_those_before_it_at_most() -> None:
    assert after().limit([5.0, 6.0, 7.0]) == MEDIAN_FACTOR * 6.0
    assert after(1.0).limit([1.5, 1.5, 1.5]) == MEDIAN_FACTOR * 1.5
    assert after(1.0).limit([5.0, 6.0, 7.0]) == MEDIAN_FACTOR * MAX_GROWTH
    assert after(1.0).measure([5.0, 6.0, 7.0]) == MAX_GROWTH
    assert after(1.0, None, 1.0, 9.0).limit([6.0] * 3) == MEDIAN_FACTOR * MAX_GROWTH
    assert after(1.0, 9.0).limit([6.0] * 3) == MEDIAN_FACTOR * MAX_GROWTH  # of two, the lower one


def test_shorter_updates_lower_the_bound_at_once() -> None:
    assert after(100.0, 50.0).limit([0.1, 0.2, 0.3]) == MEDIAN_FACTOR * 0.2


@pytest.mark.parametrize("lengths", [[], [3.0], [3.0, 1e6]])
def test_fewer_than_three_are_bounded_by_what_earlier_rounds_showed(lengths: list[float]) -> None:
    assert after(1.0).limit(lengths) == MEDIAN_FACTOR * MAX_GROWTH
    assert after(1.0).measure(lengths) is None
    assert after(None).limit(lengths) is None


def test_rounds_in_which_nothing_moved_say_nothing_of_later_ones() -> None:
    assert after().measure([0.0, 0.0, 0.0]) is None
    assert after().measure([0.0, 0.0, 0.0, 5.0]) == 0.0
    assert after(0.0, 0.0, 1.0).limit([1.0] * 3) == MEDIAN_FACTOR


def test_a_bound_that_is_fixed_counts_nothing() -> None:
    assert NormBound(BASE, 2.5).measure([1.0, 2.0, 3.0]) is None


@pytest.mark.parametrize("each_time", [1.1, 10.0, 1e30])
def test_devices_that_all_grow_together_double_the_bound_no_faster_than_the_rounds(
    each_time: float,
) -> None:
    measures, limits = [1.0], [MEDIAN_FACTOR]
    for _ in range(500):
        bound = after(*measures)
        lengths = [limits[-1] * each_time] * 8
        limit, measure = bound.limit(lengths), bound.measure(lengths)
        assert limit is not None
        assert measure is not None
        limits.append(limit)
        measures.append(measure)
    assert all(
        limit <= MEDIAN_FACTOR * MAX_GROWTH * (place + 1) for place, limit in enumerate(limits)
    )


COUNTED = Layout(("weight", "steps"), ((SIZE,), (70_000,)), integers=1)


def test_counters_do_not_count_in_a_length_and_stay_possible() -> None:
    """Else their steps would widen the bound on the weights beside them."""
    base = np.concatenate([BASE, np.zeros(70_000, np.float32)])
    steps = np.full(70_000, 2.0**24, np.float32)
    intake = Intake(update_spec(run_of(), COUNTED), base=base)
    found = intake.read(reply(1, np.concatenate([moved(1.0, 1), steps])))
    assert found.distance == pytest.approx(1.0, rel=1e-4)
    steps[-1] *= 2
    with pytest.raises(InvalidUpdate, match=r"an integer of its state is above 2\*\*24"):
        intake.read(reply(1, np.concatenate([moved(1.0, 1), steps])))
