"""How good a round's model is: on the cloud's data, or on what clients hold back."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from flwr.app import Message, MessageType, RecordDict

from fedcore.errors import InvalidUpdate, RoundFailed
from fedcore.metrics import Metric
from fedcore.model import FullModel
from fedcore.observability.foreign import foreign
from fedcore.updates.messages import (
    ARRAYS,
    CONFIG,
    instruction_config,
    read_metrics,
    weights_record,
)
from fedcore.updates.pack import Layout, Vector, unpack
from server.cohort import select
from server.progress import Progress
from server.records import RoundRecord

if TYPE_CHECKING:
    from server.rounds import Federation


def judge_round(
    federation: Federation, model: FullModel, layout: Layout, progress: Progress, weights: Vector
) -> tuple[dict[str, float], str]:
    """Metrics of ``weights``, which the round after ``progress`` gave, and what on."""
    size = federation.run.federation.evaluate_cohort
    if size:
        return _evaluate_on_clients(federation, weights, layout, progress, size), "clients"
    if federation.judge:
        unpack(weights, model.model)
        return federation.judge(model), "cloud"
    return {}, "nothing"


def _evaluate_on_clients(
    federation: Federation, weights: Vector, layout: Layout, progress: Progress, size: int
) -> dict[str, float]:
    """Means over some clients' held-out data, each weighed by its number of examples."""
    run, number = federation.run, progress.round + 1

    def draw() -> list[int]:
        there = list(federation.grid.get_node_ids())
        if not there:
            raise RoundFailed(
                f"round {number}: no client is there to evaluate it, and "
                f"federation.evaluate_cohort asks for {size}. The round does not count; start "
                "clients, and go on with the run, or run it anew."
            )
        words = ("evaluation", number)
        return select(there, min(size, len(there)), seed=run.seed, words=words)

    nodes = federation.keeper.asked(MessageType.EVALUATE, draw)
    config = instruction_config(layout, progress.preprocess)
    config["server-round"] = number
    record = RecordDict({ARRAYS: weights_record(weights), CONFIG: config})
    messages = [Message(record, node, MessageType.EVALUATE) for node in nodes]
    parts: dict[str, list[float]] = {}
    total, reasons = 0, []
    for reply in federation.grid.send_and_receive(messages, timeout=run.federation.deadline_s):
        if reply.has_error():
            reasons.append(foreign(reply.error.reason or f"error {reply.error.code}"))
            continue
        try:
            count, values = read_metrics(reply, where=f"node {reply.metadata.src_node_id}")
        except InvalidUpdate as error:
            reasons.append(str(error))
            continue
        total += count
        for name, value in values.items():
            parts.setdefault(name, []).append(value * count)
    if not total:
        raise RoundFailed(
            f"round {number}: none of {len(nodes)} clients could be evaluated. First: "
            f"{'; '.join(reasons[:1]) or 'no reply came before the deadline'}"
        )
    # Summed as if with infinite precision: the order in which clients answer must not show.
    return {name: math.fsum(values) / total for name, values in sorted(parts.items())}


def is_better(primary: Metric, records: Sequence[RoundRecord], best_round: int) -> bool:
    """Whether the latest round is better than the best before; true where that is unknown."""
    latest = records[-1].metrics.get(primary.name)
    best = records[best_round - 1].metrics.get(primary.name) if best_round else None
    if latest is None or best is None or math.isnan(best):
        return True
    return primary.better(latest, best)
