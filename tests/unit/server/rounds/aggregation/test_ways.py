"""The ways of aggregating give the same, however the updates are split and whenever they come."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from flwr.app import Message, RecordDict

from fedcore.flower.identity import assume_identity
from fedcore.updates.messages import ARRAYS, METRICS, MODEL, Update, update_content
from fedcore.updates.replies import ArraySpec, ReplySpec, read_reply
from server.rounds.aggregation import mean
from server.rounds.aggregation.bounded_mean import BoundedMean
from server.rounds.aggregation.exact_mean import ExactMean
from server.rounds.aggregation.held import HeldUpdates
from server.rounds.aggregation.interface import Aggregate, WeightedUpdate
from server.rounds.aggregation.mean import StreamedMean
from server.rounds.aggregation.norm_bound import NormBound

SIZE = 40
BASE = np.linspace(-1.0, 1.0, SIZE).astype(np.float32)
SPEC = ReplySpec("train", {}, {MODEL: ArraySpec("float32", (SIZE,))})
WAYS: dict[str, Callable[[], Any]] = {
    "mean": lambda: StreamedMean(ExactMean(SIZE)),
    "awaiting": lambda: StreamedMean.awaiting(SIZE),
    "adaptive bound": lambda: BoundedMean(StreamedMean(ExactMean(SIZE)), NormBound(BASE, None)),
    "fixed bound": lambda: BoundedMean(StreamedMean(ExactMean(SIZE)), NormBound(BASE, 1.5)),
    "held": lambda: HeldUpdates(None),
    "held, adaptive bound": lambda: HeldUpdates(NormBound(BASE, None)),
}


@pytest.fixture(autouse=True)
def _identity() -> None:
    assume_identity(1)


def update(node: int) -> WeightedUpdate:
    """The fourth is far from the others."""
    way = np.random.default_rng(node).standard_normal(SIZE)
    length = 500.0 if node == 4 else 1.0 + node / 10
    weights = (BASE + way * length / np.linalg.norm(way)).astype(np.float32)
    reply = Message(
        update_content(Update(weights, 7, {})), reply_to=Message(RecordDict(), node, "train")
    )
    found = read_reply(reply, SPEC, where="update", base=BASE)
    return WeightedUpdate(reply, found, weight=node)


def aggregated(way: Callable[[], Any], parts: Sequence[Sequence[int]]) -> Aggregate:
    first, *rest = [way() for _ in parts]
    for aggregation, nodes in zip((first, *rest), parts, strict=True):
        for node in nodes:
            aggregation.add(update(node))
    for other in rest:
        first.merge(other)
    found: Aggregate = first.result()
    return found


def bits(found: Aggregate) -> tuple[object, ...]:
    mean = found.mean.mean().tobytes() if found.mean is not None else None
    updates = [
        (
            one.metadata.src_node_id,
            one.content[ARRAYS][MODEL].numpy().tobytes(),  # type: ignore[index, union-attr]
            one.content[METRICS]["num-examples"],  # type: ignore[index]
        )
        for one in found.updates
    ]
    return mean, updates, sorted(found.clipped), found.median_norm


@pytest.mark.parametrize("name", WAYS)
def test_order_and_parts_change_no_bit(name: str) -> None:
    whole = bits(aggregated(WAYS[name], [(1, 2, 3, 4)]))
    for order in itertools.permutations((1, 2, 3, 4)):
        for cut in range(5):
            assert bits(aggregated(WAYS[name], [order[:cut], order[cut:]])) == whole
    assert bits(aggregated(WAYS[name], [(), (3,), (), (1, 4), (2,)])) == whole


@pytest.mark.parametrize(
    ("name", "clipped"), [("mean", []), ("adaptive bound", [4]), ("held, adaptive bound", [4])]
)
def test_each_weighs_what_it_was_given_and_the_far_one_is_clipped(
    name: str, clipped: list[int]
) -> None:
    found = aggregated(WAYS[name], [(1, 2, 3, 4)])
    assert [node for node, _ in found.clipped] == clipped
    if found.mean is None:
        weights = [one.content[METRICS]["num-examples"] for one in found.updates]  # type: ignore[index]
        assert weights == [1, 2, 3, 4]
        return
    assert (found.mean.weight, found.mean.count) == (10, 4)
    far = np.linalg.norm(found.mean.mean() - BASE)
    assert far > 100 if not clipped else far < 10


def test_a_mean_and_what_is_held_agree() -> None:
    mean = aggregated(WAYS["adaptive bound"], [(1, 2, 3, 4)]).mean
    assert mean is not None
    held = aggregated(WAYS["held, adaptive bound"], [(1, 2, 3, 4)]).updates
    vectors = [one.content[ARRAYS][MODEL].numpy() for one in held]  # type: ignore[index, union-attr]
    expected = np.average(vectors, axis=0, weights=[1, 2, 3, 4])
    assert np.abs(mean.mean() - expected).max() < 1e-6


def test_a_sum_of_workers_is_taken_over_and_not_added_to_zeros() -> None:
    worker = ExactMean(SIZE)
    worker.add(BASE, 3)
    total = StreamedMean(ExactMean(SIZE))
    total.merge(StreamedMean(worker))
    found = total.result().mean
    assert found is worker


def test_a_long_sum_is_compiled_and_has_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = bits(aggregated(WAYS["awaiting"], [[1, 2, 3, 4]]))
    monkeypatch.setattr(mean, "COMPILED_FROM", SIZE)
    assert StreamedMean.awaiting(SIZE).total._compiled is not None
    assert bits(aggregated(WAYS["awaiting"], [[1, 2, 3, 4]])) == expected
