"""Aggregation of accepted updates: fold each into an exact mean, or hold all for the strategy.

`fold` serves strategies that need only the weighted mean; `hold` serves the others. Both clip
updates to the round's `NormBound`.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import numpy as np
from flwr.app import Message

from fedcore.errors import ResourceError
from fedcore.updates.messages import ARRAYS, Update, update_content
from fedcore.updates.pack import Layout
from fedcore.updates.replies import Reply
from server.rounds.aggregation.exact_mean import ExactMean
from server.rounds.inbound import Tally
from server.rounds.norm_bound import NormBound

_TOUCHED = 2**19
"""Model size in elements (4 MiB of sums) from which on allocating the sum's pages takes
noticeable time."""


def hold(
    taken: Iterator[tuple[Message, Reply]],
    tally: Tally,
    *,
    uniform: bool,
    bound: NormBound | None = None,
) -> list[Message]:
    """Returns every update of the round, clipped to ``bound``, in order of node id.

    Metrics that only some clients report are dropped: Flower rejects a whole round whose replies
    differ in their metrics.
    """
    held, lengths = [], list[float]()
    for reply, found in taken:
        with _kept(reply):
            held.append((reply, found.update()))
        lengths.append(found.distance or 0.0)
        del reply.content[ARRAYS], found  # keeps one copy of the weights
    limit = bound.limit(lengths) if bound is not None else None
    tally.median_norm = bound.measure(lengths) if bound is not None else None
    for place, (reply, update) in enumerate(held):
        scale = _scale(bound, reply, lengths[place], limit, tally)
        if bound is not None and scale < 1.0:
            whole = np.concatenate([*bound.moved(partial(iter, (update.weights,)), scale)])
            held[place] = reply, replace(update, weights=whole)
    held.sort(key=lambda pair: pair[0].metadata.src_node_id)
    common = set.intersection(*(set(update.metrics) for _, update in held)) if held else set()
    for reply, update in held:
        tally.count(update.num_examples, update.metrics)
        reply.content = update_content(
            Update(
                update.weights,
                1 if uniform else update.num_examples,
                {name: value for name, value in update.metrics.items() if name in common},
            )
        )
    return [reply for reply, _ in held]


def fold(
    taken: Iterable[tuple[Message, Reply]],
    layout: Layout,
    tally: Tally,
    *,
    uniform: bool,
    bound: NormBound | None = None,
) -> ExactMean:
    """Returns the exact weighted mean of all updates, folding in each on arrival, part by part.

    Where ``bound`` depends on all updates, those that exceed it are subtracted again and folded in
    clipped. Sums are exact, so the subtraction leaves no residue.
    """
    mean = ExactMean(layout.size)
    if layout.size >= _TOUCHED:
        taken = _touched(taken, mean)
    if bound is not None and bound.fixed is None:
        _fold_all(taken, mean, tally, uniform=uniform, bound=bound)
        return mean
    limit = bound.limit(()) if bound is not None else None
    for reply, found in taken:
        scale = _scale(bound, reply, found.distance or 0.0, limit, tally)
        _fold_one(reply, found, mean, uniform=uniform, bound=bound, scale=scale)
        tally.count(found.num_examples, found.metrics)
        del reply, found  # or this frame would keep it while the next one is read
    return mean


def _touched(
    taken: Iterable[tuple[Message, Reply]], mean: ExactMean
) -> Iterator[tuple[Message, Reply]]:
    """Yields the updates unchanged, and has a thread allocate the sum before the first arrives."""
    touching = threading.Thread(target=mean.touch, name="touching", daemon=True)
    touching.start()
    try:
        for pair in taken:
            touching.join()
            yield pair
            del pair  # or this frame would keep it while the next one is read
    finally:
        touching.join()


def _fold_all(
    taken: Iterable[tuple[Message, Reply]],
    mean: ExactMean,
    tally: Tally,
    *,
    uniform: bool,
    bound: NormBound,
) -> None:
    """Folds updates in before their bound is known; clips those that exceed it afterwards.

    An update that would make the sum use more memory is not folded until the bound is known:
    clipped to the bound, it is usually small.
    """
    held: list[tuple[Message, Reply, bool]] = []
    for reply, found in taken:
        weight = 1 if uniform else found.num_examples
        early = found.peaks is not None and mean.has_room(found.peaks, weight)
        if early:
            _fold_one(reply, found, mean, uniform=uniform, bound=None, scale=1.0)
        held.append((reply, found, early))
        del reply, found
    lengths = [found.distance or 0.0 for _, found, _ in held]
    limit, tally.median_norm = bound.limit(lengths), bound.measure(lengths)
    late: list[tuple[Message, Reply, float]] = []
    for reply, found, early in held:
        scale = _scale(bound, reply, found.distance or 0.0, limit, tally)
        tally.count(found.num_examples, found.metrics)
        if early and scale < 1.0:
            assert found.peaks is not None
            with _kept(reply):
                weight = 1 if uniform else found.num_examples
                mean.take_back(found.parts, weight, peaks=found.peaks)
        if scale < 1.0 or not early:
            late.append((reply, found, scale))
    for reply, found, scale in late:  # after every `take_back`: the sum may take more limbs now
        _fold_one(reply, found, mean, uniform=uniform, bound=bound, scale=scale)


def _fold_one(
    reply: Message,
    found: Reply,
    mean: ExactMean,
    *,
    uniform: bool,
    bound: NormBound | None,
    scale: float,
) -> None:
    parts, peaks = found.parts, found.peaks
    if bound is not None and scale < 1.0:
        parts, peaks = partial(bound.moved, found.parts, scale), None
    with _kept(reply):
        mean.add_parts(parts, 1 if uniform else found.num_examples, peaks=peaks)


@contextmanager
def _kept(reply: Message) -> Iterator[None]:
    """Raises `ResourceError` where the block cannot read an accepted update from its storage."""
    try:
        yield
    except OSError as error:
        raise ResourceError(
            f"update from node {reply.metadata.src_node_id}: cannot read its stored copy "
            f"({error.strerror or error}). The round was not aggregated, and the journal is "
            "intact; repair the disk and continue with --resume."
        ) from error


def _scale(
    bound: NormBound | None, reply: Message, length: float, limit: float | None, tally: Tally
) -> float:
    """Returns the factor that clips an update to ``limit``; counts an update that is clipped."""
    if bound is None or limit is None or length <= limit:
        return 1.0
    tally.clipped.append((reply.metadata.src_node_id, length))
    return limit / length
