"""Aggregation of accepted updates as a round does it, for tests."""

from __future__ import annotations

from collections.abc import Iterable

from flwr.app import Message

from fedcore.updates.pack import Layout
from fedcore.updates.replies import Reply
from server.rounds.aggregation.bounded_mean import BoundedMean
from server.rounds.aggregation.exact_mean import ExactMean
from server.rounds.aggregation.held import HeldUpdates
from server.rounds.aggregation.interface import Aggregation
from server.rounds.aggregation.mean import StreamedMean
from server.rounds.aggregation.norm_bound import NormBound
from server.rounds.inbound import Tally, collect

Taken = Iterable[tuple[Message, Reply]]


def fold(
    taken: Taken, layout: Layout, tally: Tally, *, uniform: bool, bound: NormBound | None = None
) -> ExactMean:
    total = StreamedMean.awaiting(layout.size)
    aggregation: Aggregation = total if bound is None else BoundedMean(total, bound)
    collect(taken, aggregation, tally, uniform=uniform)
    found = aggregation.result()
    tally.bounded(found)
    assert found.mean is not None
    return found.mean


def hold(
    taken: Taken, tally: Tally, *, uniform: bool, bound: NormBound | None = None
) -> list[Message]:
    aggregation = HeldUpdates(bound)
    collect(taken, aggregation, tally, uniform=uniform)
    found = aggregation.result()
    tally.bounded(found)
    assert found.mean is None
    return [*found.updates]
