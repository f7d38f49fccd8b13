"""One round of training: send instructions, collect updates, check the quorum, aggregate.

`train_round` takes the run's progress and the round's nodes, and returns the new global weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

from flwr.app import ArrayRecord, Message

from fedcore.errors import FedcoreError, RoundFailed
from fedcore.flower.grid import reply_batches
from fedcore.observability.words import counted
from fedcore.updates.messages import check_weights, joined
from fedcore.updates.pack import Layout
from server.records import RoundRecord
from server.rounds.aggregation.exact_mean import ExactMean
from server.rounds.checkpointing import Progress
from server.rounds.client_privacy import (
    Released,
    bound_of,
    draws_of,
    release,
)
from server.rounds.endings import announce
from server.rounds.expected import asked_to_train
from server.rounds.federation import Federation
from server.rounds.fold import fold, hold
from server.rounds.inbound import (
    Intake,
    Tally,
    accepted,
    aggregated,
    fold_in_place,
    mean_as_reply,
    payload_bytes,
)
from server.rounds.instructions import instruction_in_place, instructions, streams
from server.rounds.norm_bound import NormBound, norm_bound
from server.rounds.quorum import check_quorum


@dataclass(frozen=True)
class Collected:
    """The clients' replies to one round of training."""

    mean: ExactMean | None
    """Weighted mean of their updates, where the strategy folds them; else None."""
    updates: list[Message]
    """Every update, where the strategy does not fold them; else empty."""
    instruction: Message
    """One of the messages sent; a strategy's input is built as a reply to it."""
    bytes_down: int
    """Bytes of the arrays that were sent, over all clients."""


def train_round(
    federation: Federation,
    progress: Progress,
    records: Sequence[RoundRecord],
    layout: Layout,
    nodes: Sequence[int],
    tally: Tally,
) -> tuple[Released, int]:
    """Trains the weights of ``progress`` for one round on ``nodes``.

    Args:
        federation: Fixed parts of the run.
        progress: State before the round.
        records: Of the rounds before.
        layout: Of the weights.
        nodes: Nodes to ask.
        tally: Counts replies; modified in place.

    Returns:
        The new weights, and the bytes of arrays that were sent.

    Raises:
        RoundFailed: there were fewer updates than the quorum, or the strategy rejected them.
    """
    run, number, protection = federation.run, progress.round + 1, progress.protection
    norm = norm_bound(run, progress.weights, live=federation.live, records=records)
    collected = _collect(federation, progress, layout, nodes, tally, norm)
    announce(federation, progress, records, tally, norm)
    others = _others(federation, progress, nodes, tally)
    check_quorum(tally, run.federation.quorum, federation.cohort, number, others=others)
    if tally.over or (not tally.updates and protection is None):
        return Released(progress.weights, protection), collected.bytes_down
    return _aggregate(federation, progress, layout, nodes, tally, collected), collected.bytes_down


def _collect(
    federation: Federation,
    progress: Progress,
    layout: Layout,
    nodes: Sequence[int],
    tally: Tally,
    norm: NormBound | None,
) -> Collected:
    """Sends the round's instructions and collects the updates, folding them where possible."""
    run, protection, in_place = federation.run, progress.protection, federation.folding
    uniform, deadline_s = run.uniform, run.federation.deadline_s
    # A strategy may record what it sends, so it configures a message even where no node was drawn.
    shown = nodes or federation.nodes()[:1]
    if in_place:
        first, configs = instruction_in_place(federation, progress, layout, shown)
        if not nodes:
            return Collected(ExactMean(layout.size), [], first, 0)
        mean = fold_in_place(
            in_place, first, nodes, tally, configs=configs, uniform=uniform, deadline_s=deadline_s
        )
        return Collected(mean, [], first, payload_bytes(first) * len(nodes))
    messages = instructions(federation, progress, layout, shown)
    if not nodes:
        return Collected(ExactMean(layout.size), [], messages[0], 0)
    messages.sort(key=lambda message: message.metadata.dst_node_id)
    first, sent = messages[0], sum(payload_bytes(message) for message in messages)
    intake = Intake(
        asked_to_train(run, layout),
        checkpointer=federation.checkpointer,
        peers=federation.peers,
        base=progress.weights if norm else None,
        bound=bound_of(run, protection, progress.weights) if protection else None,
        on_note=federation.on_note,
        budgets=run.private,
    )
    enough = len(nodes) if protection else federation.cohort
    replies = reply_batches(federation.grid, messages, timeout=deadline_s)
    taken = accepted(replies, intake, tally, first=enough)
    del replies  # releases late replies once enough are accepted
    if federation.chosen.folds:
        return Collected(fold(taken, layout, tally, uniform=uniform, bound=norm), [], first, sent)
    updates = hold(taken, tally, uniform=uniform, bound=norm)
    return Collected(None, updates, first, sent)


def _aggregate(
    federation: Federation,
    progress: Progress,
    layout: Layout,
    nodes: Sequence[int],
    tally: Tally,
    collected: Collected,
) -> Released:
    """Returns the weights that follow from a round's updates."""
    mean, updates, protection = collected.mean, collected.updates, progress.protection
    if mean is not None:
        if protection is not None:
            draws = draws_of(federation.randomness, "client noise", progress.round + 1)
            released = release(
                federation.run,
                protection,
                progress.weights,
                mean,
                nodes=nodes,
                unclipped=tally.unclipped,
                draws=draws,
            )
            weights, protection = released.weights, released.protection
        else:
            weights = joined(mean.mean_parts(), layout.size)
        if federation.chosen.means:
            return Released(check_weights(weights, layout, where="aggregate"), protection)
        updates = [mean_as_reply(weights, max(mean.weight, 1), collected.instruction)]
    number = progress.round + 1
    arrays = _aggregated(federation, number, updates, tally)
    weights = progress.weights if arrays is None else aggregated(arrays, layout, number)
    return Released(weights, protection)


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
    there = federation.nodes()
    if not federation.live:
        return len(there) - len(nodes)
    return len(set(there).difference(nodes, progress.spent))
