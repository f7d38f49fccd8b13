"""One round of training: send instructions, collect updates, check the quorum, aggregate.

`train_round` takes the run's progress and the round's cohort, and returns the new global weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from math import prod

import numpy as np
from flwr.app import ArrayRecord, Message

from fedcore.errors import FedcoreError, RoundFailed
from fedcore.flower.grid import reply_batches
from fedcore.observability.words import counted
from fedcore.updates.messages import CONFIG, check_weights, joined
from fedcore.updates.pack import Layout, Vector
from server.records import RoundRecord
from server.rounds.aggregation.bounded_mean import BoundedMean
from server.rounds.aggregation.exact_mean import ExactMean
from server.rounds.aggregation.held import HeldUpdates
from server.rounds.aggregation.interface import Aggregate, Aggregation
from server.rounds.aggregation.mean import StreamedMean
from server.rounds.aggregation.norm_bound import NormBound, norm_bound
from server.rounds.checkpointing.progress import Progress
from server.rounds.client_privacy.mechanism import Released, bound_of, draws_of, release
from server.rounds.cohort import Cohort
from server.rounds.endings import announce
from server.rounds.expected import update_spec
from server.rounds.federation import Federation
from server.rounds.inbound import (
    Intake,
    Tally,
    accepted,
    aggregated,
    collect,
    collect_in_place,
    mean_as_reply,
    payload_bytes,
)
from server.rounds.instructions import (
    instruction_in_place,
    instructions,
    settings_in_round,
    streams,
)
from server.rounds.quorum import check_quorum

_VARIANCE = "running_var"
"""How torch's batch and instance normalisation name the variance that they keep."""


@dataclass(frozen=True)
class TrainingRound:
    """One round: where it starts from, and whom it asks."""

    federation: Federation
    progress: Progress
    """State before the round."""
    layout: Layout
    """Layout of the weights."""
    cohort: Cohort
    norm: NormBound | None
    """Bound on the updates; None where they are not clipped."""
    tally: Tally
    """Counts replies; modified in place."""

    @property
    def number(self) -> int:
        """The round's number; the first is 1."""
        return self.progress.round + 1

    @property
    def shown(self) -> Sequence[int]:
        """The nodes that the strategy configures messages for.

        It may record what it sends, so it configures one even where no node was drawn.
        """
        return self.cohort.nodes or self.federation.nodes()[:1]


@dataclass(frozen=True)
class Sent:
    """What a round has sent to its cohort."""

    instruction: Message
    """One of the messages; a strategy's input is built as a reply to it."""
    bytes_down: int
    """Bytes of the arrays that were sent, over all clients."""
    client: Mapping[str, float] = field(default_factory=dict)
    """Settings of local training that are this round's own."""


def train_round(
    federation: Federation,
    progress: Progress,
    records: Sequence[RoundRecord],
    layout: Layout,
    cohort: Cohort,
    tally: Tally,
) -> tuple[Released, Sent]:
    """Trains the weights of ``progress`` for one round on a cohort.

    Args:
        federation: Fixed parts of the run.
        progress: State before the round.
        records: Of the rounds before.
        layout: Of the weights.
        cohort: Nodes to ask.
        tally: Counts replies; modified in place.

    Returns:
        The new weights, and what was sent.

    Raises:
        RoundFailed: there were fewer updates than the quorum, or the strategy rejected them.
    """
    run, protection = federation.run, progress.protection
    norm = norm_bound(run, progress.weights, live=federation.live, records=records)
    this = TrainingRound(federation, progress, layout, cohort, norm, tally)
    aggregate, sent = _train_in_place(this) if federation.folding else _train(this)
    tally.bounded(aggregate)
    announce(federation, progress, records, tally, norm)
    others = _others(federation, progress, cohort.nodes, tally)
    check_quorum(tally, run.federation.quorum, federation.cohort, this.number, others=others)
    if tally.over or (not tally.updates and protection is None):
        return Released(progress.weights, protection), sent
    return _new_weights(this, aggregate, sent), sent


def _train(this: TrainingRound) -> tuple[Aggregate, Sent]:
    """Sends each node its instruction, and aggregates the updates as they arrive."""
    federation, progress, nodes = this.federation, this.progress, this.cohort.nodes
    run, protection, weights = federation.run, progress.protection, progress.weights
    aggregation = _aggregation(this)
    messages = instructions(federation, progress, this.layout, this.shown)
    if not nodes:
        return aggregation.result(), Sent(messages[0], 0)
    messages.sort(key=lambda message: message.metadata.dst_node_id)
    settings = settings_in_round(
        run, this.number, (message.content.config_records[CONFIG] for message in messages)
    )
    bytes_down = sum(payload_bytes(message) for message in messages)
    sent = Sent(messages[0], bytes_down, settings)
    intake = Intake(
        update_spec(run, this.layout),
        checkpointer=federation.checkpointer,
        peers=federation.peers,
        base=weights if this.norm else None,
        bound=bound_of(run, protection, weights) if protection else None,
        on_note=federation.on_note,
        weights=this.cohort.weights,
        budgets=run.private,
    )
    enough = len(nodes) if protection else federation.cohort
    deadline_s = run.federation.deadline_s
    replies = reply_batches(federation.grid, messages, timeout=deadline_s)
    taken = accepted(replies, intake, this.tally, first=enough)
    del replies  # releases late replies once enough are accepted
    collect(taken, aggregation, this.tally, uniform=run.uniform)
    return aggregation.result(), sent


def _aggregation(this: TrainingRound) -> Aggregation:
    """Returns how the updates that nodes send are aggregated."""
    if not this.federation.chosen.folds:
        return HeldUpdates(this.norm)
    total = StreamedMean.awaiting(this.layout.size)
    return total if this.norm is None else BoundedMean(total, this.norm)


def _train_in_place(this: TrainingRound) -> tuple[Aggregate, Sent]:
    """Has the grid train the nodes and add their updates up."""
    federation, nodes, grid = this.federation, this.cohort.nodes, this.federation.folding
    assert grid is not None
    first, configs = instruction_in_place(federation, this.progress, this.layout, this.shown)
    total = StreamedMean(ExactMean(this.layout.size))
    if nodes:
        collect_in_place(
            grid,
            first,
            nodes,
            total,
            this.tally,
            configs=configs,
            uniform=federation.run.uniform,
            deadline_s=federation.run.federation.deadline_s,
        )
    common = first.content.config_records[CONFIG]
    settings = settings_in_round(federation.run, this.number, [common, *configs.values()])
    return total.result(), Sent(first, payload_bytes(first) * len(nodes), settings)


def _new_weights(this: TrainingRound, aggregate: Aggregate, sent: Sent) -> Released:
    """Returns the weights that follow from a round's updates."""
    federation, progress, layout = this.federation, this.progress, this.layout
    protection, updates = progress.protection, aggregate.updates
    if aggregate.mean is not None:
        found = _mean(this, aggregate.mean)
        if federation.chosen.means:
            weights = check_weights(found.weights, layout, where="aggregate")
            return replace(
                found, weights=without_negative_variances(weights, progress.weights, layout)
            )
        weight, protection = max(aggregate.mean.weight, 1), found.protection
        updates = [mean_as_reply(found.weights, weight, sent.instruction)]
    arrays = _aggregated(federation, this.number, updates, this.tally)
    weights = progress.weights if arrays is None else aggregated(arrays, layout, this.number)
    if aggregate.mean is not None:  # a step of an optimiser is not for counters and flags
        weights = _with_integers(weights, found.weights, layout)
    return Released(without_negative_variances(weights, progress.weights, layout), protection)


def without_negative_variances(weights: Vector, before: Vector, layout: Layout) -> Vector:
    """Returns weights in which running variances below zero have their values from ``before``.

    Noise and the steps of an optimiser can make them so, and a model's answers would be NaN. The
    choice reads published weights alone, so it costs no privacy.
    """
    first, kept = 0, weights
    for name, shape in zip(layout.names, layout.shapes, strict=True):
        part = slice(first, first + prod(shape))
        first = part.stop
        if name.endswith(_VARIANCE) and bool((weights[part] < 0).any()):
            kept = weights.copy() if kept is weights else kept
            kept[part] = np.where(weights[part] < 0, before[part], weights[part])
    return weights if kept is weights else joined((kept,), layout.size)


def _with_integers(weights: Vector, source: Vector, layout: Layout) -> Vector:
    """Returns weights with the integers of ``source``."""
    if not layout.whole:
        return weights
    floats = layout.size - layout.whole
    return joined((weights[:floats], source[floats:]), layout.size)


def _mean(this: TrainingRound, mean: ExactMean) -> Released:
    """Returns the mean of a round's updates, with noise under client-level privacy."""
    federation, progress = this.federation, this.progress
    if progress.protection is None:
        return Released(joined(mean.mean_parts(), this.layout.size), None)
    found = release(
        federation.run,
        progress.protection,
        progress.weights,
        mean,
        nodes=this.cohort.nodes,
        unclipped=this.tally.unclipped,
        draws=draws_of(federation.randomness, "client noise", this.number),
    )
    # No client changes them, see `fedcore.training.state`: only noise has.
    return replace(found, weights=_with_integers(found.weights, progress.weights, this.layout))


def _aggregated(
    federation: Federation, number: int, ready: Sequence[Message], tally: Tally
) -> ArrayRecord | None:
    """Returns the strategy's aggregate of the updates, or of their mean.

    Raises:
        RoundFailed: the strategy raised an error.
    """
    strategy = federation.chosen.strategy
    try:
        with nullcontext() if federation.folding else streams(federation, number, "aggregate"):
            arrays, _ = strategy.aggregate_train(number, ready)
    except FedcoreError:
        raise
    except Exception as error:  # a strategy may raise any error
        raise RoundFailed(
            f"round {number}: {federation.chosen.name} failed to aggregate "
            f"{counted(tally.updates, 'update')}: {type(error).__name__}: {error}. The global "
            f"model is that of round {number - 1}."
        ) from error
    return arrays


def _others(federation: Federation, progress: Progress, nodes: Sequence[int], tally: Tally) -> int:
    """Returns how many clients were not asked and may have budget left.

    A simulation does not track spent budgets: if a whole cohort declines, it returns 0, which ends
    the run.
    """
    if not tally.declined or (tally.all_declined and not federation.live):
        return 0
    connected = federation.nodes()
    if not federation.live:
        return len(connected) - len(nodes)
    return len(set(connected).difference(nodes, progress.spent))
