"""Evaluation of a round's model: on clients' held-out data, or on the cloud's data."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from flwr.app import Message, MessageType, RecordDict
from flwr.serverapp import Grid

from fedcore.errors import RoundFailed
from fedcore.flower.grid import reply_batches
from fedcore.observability.words import counted
from fedcore.task.metrics import LARGEST_METRIC, Metric
from fedcore.task.model import FullModel
from fedcore.updates.messages import ARRAYS, CONFIG, instruction_config, weights_record
from fedcore.updates.pack import Layout, Vector, unpack
from fedcore.updates.replies import Reply
from server.records import RoundRecord
from server.rounds.checkpointing.checkpointer import RoundCheckpointer
from server.rounds.checkpointing.progress import Progress
from server.rounds.cohort import Cohort, select
from server.rounds.expected import evaluation_spec
from server.rounds.inbound import Intake, Tally, accepted
from server.rounds.outliers import outlying
from server.rounds.peers import Peers

if TYPE_CHECKING:
    from server.rounds.federation import Federation

_NAMED = 5  # names shown in a note


def evaluate_round(
    federation: Federation, model: FullModel, layout: Layout, progress: Progress, weights: Vector
) -> tuple[dict[str, float], str]:
    """Evaluates ``weights``, the result of the round after ``progress``.

    Returns:
        The metrics, and where they were measured: ``clients``, ``cloud`` or ``nothing``.
    """
    size = federation.run.federation.evaluate_cohort
    if size:
        return _evaluate_on_clients(federation, weights, layout, progress, size), "clients"
    if federation.evaluate_on_cloud:
        unpack(weights, model.model)
        return federation.evaluate_on_cloud(model), "cloud"
    return {}, "nothing"


def _evaluate_on_clients(
    federation: Federation, weights: Vector, layout: Layout, progress: Progress, size: int
) -> dict[str, float]:
    """Returns means over some clients' held-out data, weighted by number of examples."""
    run, number = federation.run, progress.round + 1

    def draw() -> Cohort:
        connected = list(federation.grid.get_node_ids())
        if not connected:
            raise RoundFailed(
                f"round {number}: no client is connected to evaluate it, but "
                f"federation.evaluate_cohort needs {size}. The round does not count; start "
                "clients, then continue the run or start it again."
            )
        words = ("evaluation", number)
        nodes = select(connected, min(size, len(connected)), seed=run.seed, words=words)
        return Cohort(nodes, federation.peers.weights(nodes))

    answers = ask_to_evaluate(
        federation.grid,
        federation.checkpointer.cohort(MessageType.EVALUATE, draw),
        weights,
        layout=layout,
        preprocess=progress.preprocess,
        number=number,
        metrics=federation.metrics,
        deadline_s=run.federation.deadline_s,
        checkpointer=federation.checkpointer,
        peers=federation.peers,
        on_note=federation.on_note,
    )
    found = [(federation.peers.name(node), measured) for node, measured in answers]
    return {metric.name: _mean(federation, metric, found, number) for metric in federation.metrics}


def ask_to_evaluate(
    grid: Grid,
    cohort: Cohort,
    weights: Vector,
    *,
    layout: Layout,
    preprocess: bytes,
    number: int,
    metrics: Sequence[Metric],
    deadline_s: float,
    checkpointer: RoundCheckpointer,
    peers: Peers,
    on_note: Callable[[str], None],
) -> list[tuple[int, Reply]]:
    """Has a cohort evaluate ``weights`` on its held-out data.

    Returns:
        Each accepted reply with its node, in order of arrival.

    Raises:
        RoundFailed: no client could be evaluated.
    """
    config, nodes = instruction_config(layout, preprocess), cohort.nodes
    config["server-round"] = number
    record = RecordDict({ARRAYS: weights_record(weights), CONFIG: config})
    messages = [Message(record, node, MessageType.EVALUATE) for node in nodes]
    intake = Intake(
        evaluation_spec(metrics),
        checkpointer=checkpointer,
        peers=peers,
        on_note=on_note,
        weights=cohort.weights,
    )
    tally = Tally(len(nodes))
    replies = reply_batches(grid, messages, timeout=deadline_s)
    found = [
        (reply.metadata.src_node_id, measured)
        for reply, measured in accepted(replies, intake, tally, first=len(nodes))
    ]
    if not found:
        raise RoundFailed(
            f"round {number}: none of {counted(len(nodes), 'client')} could be evaluated. First: "
            f"{'; '.join(tally.reasons[:1]) or 'no reply arrived before the deadline'}"
        )
    if tally.reasons:
        on_note(
            f"round {number}: {len(tally.reasons)} of {counted(len(nodes), 'client')} could not be "
            "evaluated. "
            f"First: {tally.reasons[0]}"
        )
    return found


def _mean(
    federation: Federation, metric: Metric, found: Sequence[tuple[str, Reply]], number: int
) -> float:
    """Returns the example-weighted mean of the clients' values, without outliers.

    A metric with a bounded range needs no outlier check: a client can move its mean by no more than
    its share of the examples.
    """
    values = np.array([[one.metrics[metric.name]] for _, one in found], np.float64)
    bounded = metric.high - metric.low < LARGEST_METRIC
    far = np.zeros(len(found), np.bool_) if bounded else outlying(values)
    kept = [one for (_, one), out in zip(found, far, strict=True) if not out]
    if far.any():
        named = [
            f"{name} ({one.metrics[metric.name]:.4g})"
            for (name, one), out in zip(found, far, strict=True)
            if out
        ]
        federation.on_note(
            f"round {number}: {metric.name} excludes "
            f"{', '.join(sorted(named)[:_NAMED])}{', ...' if len(named) > _NAMED else ''}: far "
            f"from the values of the other {counted(len(kept), 'client')}."
        )
    # Exact sums: the result must not depend on the order of the replies.
    total = sum(one.num_examples for one in kept)
    return math.fsum(one.metrics[metric.name] * one.num_examples for one in kept) / total


def is_better(primary: Metric, records: Sequence[RoundRecord], best_round: int) -> bool:
    """Whether the latest round beats the best one before; True where either has no metric."""
    latest = records[-1].metrics.get(primary.name)
    best = records[best_round - 1].metrics.get(primary.name) if best_round else None
    if latest is None or best is None or math.isnan(best):
        return True
    return primary.better(latest, best)
