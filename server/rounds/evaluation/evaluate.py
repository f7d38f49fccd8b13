"""Evaluation of a round's model: on clients' held-out data, or on the cloud's data."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from flwr.app import Message, MessageType, RecordDict
from flwr.serverapp import Grid

from fedcore.errors import RoundFailed
from fedcore.flower.grid import reply_batches
from fedcore.observability.words import counted
from fedcore.task.metrics import Metric
from fedcore.task.model import FullModel
from fedcore.updates.frozen import FrozenState
from fedcore.updates.messages import ARRAYS, CONFIG, FROZEN, instruction_config, weights_record
from fedcore.updates.pack import Layout, Vector, unpack
from fedcore.updates.replies import ReplySpec
from server.records import MetricSource, RoundRecord
from server.rounds.checkpointing.checkpointer import RoundCheckpointer
from server.rounds.checkpointing.progress import Progress
from server.rounds.cohort import Cohort, select
from server.rounds.evaluation.pooling import EvaluationAnswer, Pooled, answer_of, pool
from server.rounds.expected import evaluation_of
from server.rounds.inbound import Intake, Tally, accepted
from server.rounds.instructions import carries_frozen
from server.rounds.peers import Peers

if TYPE_CHECKING:
    from server.rounds.federation import Federation

_NAMED = 5  # names shown in a note


@dataclass(frozen=True)
class RoundEvaluation:
    """Metrics of a round's model."""

    metrics: dict[str, float | None]
    """Values by metric; None where one is undefined. Empty where nothing evaluates rounds."""
    judged_on: str
    """Data of the metrics: ``clients``, ``cloud`` or ``nothing``."""
    sources: dict[str, MetricSource] = field(default_factory=dict)
    """Clients behind each metric; empty unless clients evaluated it."""
    reasons: dict[str, str] = field(default_factory=dict)
    """Why a metric is undefined, by metric."""


def evaluate_round(
    federation: Federation, model: FullModel, layout: Layout, progress: Progress, weights: Vector
) -> RoundEvaluation:
    """Evaluates ``weights``, the result of the round after ``progress``."""
    size = federation.run.federation.evaluate_cohort
    if size and not federation.run.private:  # noise would hide differences between rounds
        return _evaluate_on_clients(federation, weights, layout, progress, size)
    # A client's own layers stay on the client, so the cloud cannot judge what clients use.
    if federation.evaluate_on_cloud and not federation.run.client.local:
        unpack(weights, model.model)
        measured = federation.evaluate_on_cloud(model)
        found = {metric.name: measured.judged(metric) for metric in federation.metrics}
        return RoundEvaluation(
            {name: None if why else value for name, (value, why) in found.items()},
            "cloud",
            reasons={name: why for name, (_, why) in found.items() if why},
        )
    return RoundEvaluation({}, "nothing")


def _evaluate_on_clients(
    federation: Federation, weights: Vector, layout: Layout, progress: Progress, size: int
) -> RoundEvaluation:
    """Returns metrics over some clients' held-out data."""
    run, number = federation.run, progress.round + 1

    def draw(*, short: bool = False) -> Cohort:  # any number evaluates
        connected = federation.evaluators()
        if not connected:
            judges = (
                " (those that hold back all of their data)" if run.federation.has_judges else ""
            )
            raise RoundFailed(
                f"round {number}: no client is connected to evaluate it, but "
                f"federation.evaluate_cohort needs {size}{judges}. The round does not count; start "
                "clients, then continue the run or start it again."
            )
        words = ("evaluation", number)
        nodes = select(connected, min(size, len(connected)), seed=run.seed, words=words)
        return Cohort(nodes, federation.peers.weights(nodes))

    spec = evaluation_of(run, federation.metrics, federation.outputs)
    answers = ask_to_evaluate(
        federation.grid,
        federation.checkpointer.cohort(MessageType.EVALUATE, draw),
        weights,
        layout=layout,
        preprocess=progress.preprocess,
        frozen=progress.frozen,
        number=number,
        spec=spec,
        deadline_s=run.federation.deadline_s,
        checkpointer=federation.checkpointer,
        peers=federation.peers,
        on_note=federation.on_note,
    )
    found = {
        metric.name: pool(metric, [*answers.values()], limits=spec.sums.get(metric.name))
        for metric in federation.metrics
    }
    for name, pooled in found.items():
        _note_outliers(federation, name, pooled, number)
    return RoundEvaluation(
        {name: None if pooled.reason else pooled.value for name, pooled in found.items()},
        "clients",
        {name: pooled.source for name, pooled in found.items()},
        {name: pooled.reason for name, pooled in found.items() if pooled.reason},
    )


def ask_to_evaluate(
    grid: Grid,
    cohort: Cohort,
    weights: Vector,
    *,
    layout: Layout,
    preprocess: bytes,
    frozen: FrozenState,
    number: int,
    spec: ReplySpec,
    deadline_s: float,
    checkpointer: RoundCheckpointer,
    peers: Peers,
    on_note: Callable[[str], None],
) -> dict[int, EvaluationAnswer]:
    """Has a cohort evaluate ``weights`` on its held-out data.

    Returns:
        Each accepted answer by node, in order of arrival.

    Raises:
        RoundFailed: no client could be evaluated.
    """
    config = instruction_config(layout, preprocess, frozen_sha256=frozen.sha256)
    config["server-round"], nodes = number, cohort.nodes
    record = RecordDict({ARRAYS: weights_record(weights), CONFIG: config})
    if carries_frozen(grid, frozen):
        record[FROZEN] = frozen.record
    messages = [Message(record, node, MessageType.EVALUATE) for node in nodes]
    intake = Intake(spec, checkpointer=checkpointer, peers=peers, on_note=on_note)
    tally, weights_of = Tally(len(nodes)), cohort.weights or {}
    replies = reply_batches(grid, messages, timeout=deadline_s)
    found: dict[int, EvaluationAnswer] = {}
    for reply, checked in accepted(replies, intake, tally, first=len(nodes)):
        node = reply.metadata.src_node_id
        weight = weights_of.get(node)
        found[node] = answer_of(checked, spec, name=peers.name(node), weight=weight)
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


def _note_outliers(federation: Federation, metric: str, pooled: Pooled, number: int) -> None:
    if not pooled.outliers:
        return
    named = sorted(f"{name} ({what})" for name, what in pooled.outliers)
    federation.on_note(
        f"round {number}: {metric} excludes "
        f"{', '.join(named[:_NAMED])}{', ...' if len(named) > _NAMED else ''}: far "
        f"from the values of the other {counted(pooled.source.clients, 'client')}."
    )


def announce_undefined(
    federation: Federation,
    records: Sequence[RoundRecord],
    number: int,
    judged: RoundEvaluation,
) -> None:
    """Notes metrics that are undefined, on all data or on some clients' data, when each first is.

    Args:
        federation: Fixed parts of the run.
        records: Of the rounds before.
        number: The round that was evaluated.
        judged: Its evaluation.
    """
    for name, value in judged.metrics.items():
        source, before = judged.sources.get(name), [one for one in records if name in one.metrics]
        if value is None and not any(one.metrics[name] is None for one in before):
            why = judged.reasons[name]
            consequence = ""
            if name == federation.primary.name:
                consequence = " This round cannot be the best while another has a value."
            federation.on_note(f"round {number}: {name} is undefined ({why}).{consequence}")
        elif (
            value is not None
            and source is not None
            and source.undefined
            and not any(name in one.sources and one.sources[name].undefined for one in before)
        ):
            federation.on_note(f"round {number}: {source_text(name, source)}.")


def source_text(name: str, source: MetricSource) -> str:
    """Describes the clients behind a metric, such as those on whose data it is undefined."""
    mean = ", mean of clients" if source.averaged else ""
    undefined = f"{source.undefined} undefined: {source.reason}"
    return f"{name}{mean}: {source.clients} of {counted(source.asked, 'client')} ({undefined})"


def is_better(primary: Metric, records: Sequence[RoundRecord], best_round: int) -> bool:
    """Whether the latest round beats the best one before.

    Also True where rounds are not evaluated, or the metric is undefined for the best one before.
    """
    latest = records[-1].metrics.get(primary.name)
    best = records[best_round - 1].metrics.get(primary.name) if best_round else None
    if best is None or math.isnan(best):
        return True
    if latest is None:  # undefined, which is no value to compare
        return primary.name not in records[-1].metrics
    return primary.better(latest, best)
