"""`HeldUpdates`: keeps every update, for strategies such as the median and Krum."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
from flwr.app import Message

from fedcore.updates.messages import ARRAYS, Update, update_content
from server.rounds.aggregation.interface import Aggregate, WeightedUpdate
from server.rounds.aggregation.norm_bound import NormBound


@dataclass(frozen=True)
class _HeldUpdate:
    reply: Message
    update: Update
    """With its weights in memory, and its weight as the number of examples."""
    length: float


class HeldUpdates:
    """An `Aggregation` that holds each update in memory, clipped to the round's bound."""

    def __init__(self, bound: NormBound | None) -> None:
        """Creates an empty one; ``bound`` is None where updates are not clipped."""
        self._bound = bound
        self._held: list[_HeldUpdate] = []

    def add(self, update: WeightedUpdate) -> None:
        """Reads an update into memory, and releases the message's own copy."""
        with update.readable():
            found = update.found.update()
        held = Update(found.weights, update.weight, found.metrics)
        self._held.append(_HeldUpdate(update.reply, held, update.found.distance or 0.0))
        del update.reply.content[ARRAYS]

    def merge(self, other: HeldUpdates) -> None:
        """Takes over all updates of another one."""
        self._held += other._held

    def result(self) -> Aggregate:
        """Returns every update, clipped, in order of node id.

        Metrics that only some clients report are dropped: Flower rejects a whole round whose
        replies differ in their metrics.
        """
        held, bound = self._held, self._bound
        held.sort(key=lambda one: one.reply.metadata.src_node_id)
        lengths = [one.length for one in held]
        limit = bound.limit(lengths) if bound is not None else None
        clipped = list[tuple[int, float]]()
        common = set.intersection(*(set(one.update.metrics) for one in held)) if held else set()
        for one in held:
            weights = one.update.weights
            if bound is not None and (scale := bound.scale(one.length, limit)) < 1.0:
                weights = np.concatenate([*bound.clipped_parts(partial(iter, (weights,)), scale)])
                clipped.append((one.reply.metadata.src_node_id, one.length))
            metrics = {name: found for name, found in one.update.metrics.items() if name in common}
            one.reply.content = update_content(Update(weights, one.update.num_examples, metrics))
        median_norm = bound.measure(lengths) if bound is not None else None
        return Aggregate(None, [one.reply for one in held], clipped, median_norm)
