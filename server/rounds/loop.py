"""Federated rounds: select, send, check, aggregate, judge; the best model is kept."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType

from fedcore.errors import FedcoreError, RoundFailed
from fedcore.observability.words import counted
from fedcore.task.model import FullModel, preprocess_bytes
from fedcore.updates.messages import check_weights, sendable
from fedcore.updates.pack import Layout, Vector, layout_of, pack, unpack
from server.records import RoundRecord
from server.rounds.aggregation.exact_mean import ExactMean
from server.rounds.checkpointing import Progress
from server.rounds.client_privacy import (
    Released,
    bound_of,
    draw,
    draws_of,
    epsilon,
    protect,
    release,
)
from server.rounds.cohort import select
from server.rounds.endings import announce, end_early, is_over
from server.rounds.evaluation import is_better, judge_round
from server.rounds.expected import asked_to_train
from server.rounds.federation import Federation
from server.rounds.fold import fold, hold
from server.rounds.inbound import (
    Intake,
    Tally,
    accepted,
    aggregated,
    carry,
    fold_in_place,
    payload_bytes,
)
from server.rounds.instructions import instruction_in_place, instructions, streams
from server.rounds.norm_bound import norm_bound
from server.rounds.protection import Protection
from server.rounds.quorum import check_quorum
from server.rounds.strategy_state import strategy_state_of


@dataclass(frozen=True)
class Federated:
    """What rounds leave: the best global model and the story of how it came about."""

    weights: Vector
    best_round: int
    rounds: tuple[RoundRecord, ...]
    protection: Protection | None = None
    """Of clients, as it is at the end."""


def run_rounds(federation: Federation, model: FullModel) -> Federated:
    """Runs every round and returns the best model; ``model`` is left holding the last one.

    Rounds are judged on the cloud's data, or on what clients hold back, or, where there
    is neither, not at all: then the last round counts as the best.

    Raises:
        RoundFailed: a round got fewer updates than its quorum.
        BudgetExhausted: no client's budget allows even the first round.
    """
    checkpointer, layout = federation.checkpointer, layout_of(model.model)
    start = federation.start
    progress = _held_once(start.progress if start else _beginning(federation, model))
    records = list(start.records) if start else []
    most = _most_of(*(each.epsilon_max for each in records))
    unpack(progress.weights, model.model)
    checkpointer.commit(progress, None)
    while checkpointer.may_continue(progress) and not progress.over:
        started, number = time.monotonic(), progress.round + 1
        nodes = checkpointer.cohort(MessageType.TRAIN, partial(_drawn, federation, progress))
        tally = Tally(len(nodes))
        checkpointer.begin(nodes)
        try:
            released, sent = _train_round(federation, progress, records, layout, nodes, tally)
            arrays = sendable(released.weights)
            if tally.over:
                end_early(federation, number, tally)  # what was learnt before stands
                progress = replace(progress, over=True)
                checkpointer.commit(progress, None)
                continue
            metrics, judged_on = judge_round(federation, model, layout, progress, arrays)
        except Exception:
            checkpointer.fail(progress)
            raise
        seconds = time.monotonic() - started
        protection = released.protection
        spent = epsilon(federation.run, protection, rounds=number) if protection else None
        record = _record(federation, number, seconds, tally, metrics, judged_on, sent)
        most = _most_of(most, record.epsilon_max)
        record = replace(record, epsilon_max=most, client_epsilon=spent)
        records.append(record)
        federation.on_round(record)
        better = is_better(federation.primary, records, progress.best_round)
        progress = replace(
            progress,
            round=number,
            weights=arrays,
            best=arrays if better else progress.best,
            best_round=number if better else progress.best_round,
            most_failed=max(progress.most_failed, tally.failed),
            strategy=strategy_state_of(federation.chosen.strategy),
            protection=protection,
            spent=progress.spent | tally.spent_nodes if federation.live else progress.spent,
        )
        progress = replace(progress, over=is_over(federation, progress))
        checkpointer.commit(progress, record)
    unpack(progress.weights, model.model)
    return Federated(progress.best, progress.best_round, tuple(records), progress.protection)


def _drawn(federation: Federation, progress: Progress) -> list[int]:
    there, number = _there(federation), progress.round + 1
    if progress.protection is not None:
        draws = draws_of(federation.randomness, "cohort", number)
        return draw(federation.run, progress.protection, there, draws, number=number)
    there = _willing(there, progress.spent, federation.cohort)
    size = max(federation.cohort, min(federation.asked, len(there)))
    return select(there, size, seed=federation.run.seed, words=("round", number))


def _willing(there: Sequence[int], spent: Collection[int], cohort: int) -> Sequence[int]:
    """Those whose budget is not known to be spent, and others where they are no cohort."""
    if not spent:
        return there
    rest = [node for node in there if node not in spent]
    return [*rest, *(node for node in there if node in spent)][: max(cohort, len(rest))]


def _others(federation: Federation, progress: Progress, nodes: Sequence[int], tally: Tally) -> int:
    """How many clients were not asked, and may have a budget left.

    A simulation does not note who has none: there a cohort that declined is the end.
    """
    if not tally.declined or (tally.all_declined and not federation.live):
        return 0
    there = _there(federation)
    if not federation.live:
        return len(there) - len(nodes)
    return len(set(there).difference(nodes, progress.spent))


def _there(federation: Federation) -> Sequence[int]:
    found = federation.grid.get_node_ids()
    return found if isinstance(found, Sequence) else list(found)


def _beginning(federation: Federation, model: FullModel) -> Progress:
    run, weights, protection = federation.run, pack(model.model), None
    if run.client_private:
        clients = max(federation.clients, len(_there(federation)), federation.cohort)
        protection = protect(run, clients=clients, cohort=federation.cohort)
    return Progress(
        round=0,
        over=False,
        weights=weights,
        best=weights,
        best_round=0,
        most_failed=0,
        strategy=strategy_state_of(federation.chosen.strategy),
        preprocess=preprocess_bytes(model),
        protection=protection,
    )


def _held_once(progress: Progress) -> Progress:
    """The same, with weights that are sent from where they lie."""
    weights = sendable(progress.weights)
    best = weights if progress.best is progress.weights else progress.best
    return replace(progress, weights=weights, best=best)


def _train_round(
    federation: Federation,
    progress: Progress,
    records: Sequence[RoundRecord],
    layout: Layout,
    nodes: Sequence[int],
    tally: Tally,
) -> tuple[Released, int]:
    """One round of training: what it gives, and the bytes sent; the rest is told to ``tally``."""
    run, number = federation.run, progress.round + 1
    grid, folds, protection = federation.grid, federation.chosen.folds, progress.protection
    in_place, configs = federation.folding, dict[int, ConfigRecord]()
    # Even where nobody was drawn a strategy is asked for a message, as it may remember what it
    # sends.
    shown = nodes or _there(federation)[:1]
    if in_place:
        first, configs = instruction_in_place(federation, progress, layout, shown)
        messages = [first]
    else:
        messages = instructions(federation, progress, layout, shown)
    uniform, deadline_s = run.uniform, run.federation.deadline_s
    bound = bound_of(run, protection, progress.weights) if protection else None
    norm = norm_bound(run, progress.weights, live=federation.live, records=records)
    mean: ExactMean | None = None
    ready: list[Message] = []
    if not nodes:
        mean, sent = ExactMean(layout.size), 0
    elif in_place:
        sent = payload_bytes(messages[0]) * len(nodes)
        mean = fold_in_place(
            in_place,
            messages[0],
            nodes,
            tally,
            configs=configs,
            uniform=uniform,
            deadline_s=deadline_s,
        )
    else:
        messages.sort(key=lambda message: message.metadata.dst_node_id)
        sent = sum(payload_bytes(message) for message in messages)
        replies = grid.send_and_receive(messages, timeout=deadline_s)
        enough = len(nodes) if protection else federation.cohort
        intake = Intake(
            asked_to_train(run, layout),
            checkpointer=federation.checkpointer,
            peers=federation.peers,
            base=progress.weights if norm else None,
            bound=bound,
            on_note=federation.on_note,
            budgets=run.private,
        )
        taken = accepted(replies, intake, tally, first=enough)
        del replies  # whoever is late is forgotten once enough are taken
        if folds:
            mean = fold(taken, layout, tally, uniform=uniform, bound=norm)
        else:
            ready = hold(taken, tally, uniform=uniform, bound=norm)
    announce(federation, progress, records, tally, norm)
    others = _others(federation, progress, nodes, tally)
    check_quorum(tally, run.federation.quorum, federation.cohort, number, others=others)
    if tally.over or (not tally.updates and protection is None):
        return Released(progress.weights, protection), sent
    if mean is not None and protection is not None:
        released = release(
            run,
            protection,
            progress.weights,
            mean,
            nodes=nodes,
            unclipped=tally.unclipped,
            draws=draws_of(federation.randomness, "client noise", number),
        )
        weights, protection = released.weights, released.protection
    elif mean is not None:
        weights = mean.mean()
    if mean is not None and federation.chosen.means:
        return Released(check_weights(weights, layout, where="aggregate"), protection), sent
    if mean is not None:
        ready = [carry(weights, max(mean.weight, 1), messages[0])]
    arrays = _aggregated(federation, number, ready, tally)
    weights = progress.weights if arrays is None else aggregated(arrays, layout, number)
    return Released(weights, protection), sent


def _aggregated(
    federation: Federation, number: int, ready: Sequence[Message], tally: Tally
) -> ArrayRecord | None:
    """What the strategy makes of the updates, or of their mean.

    Raises:
        RoundFailed: it refused them.
    """
    strategy = federation.chosen.strategy
    try:
        with nullcontext() if federation.folding else streams(federation, number, "aggregate"):
            arrays, _ = strategy.aggregate_train(number, ready)
    except FedcoreError:
        raise
    except Exception as error:  # Flower's strategy refused: a plain error with its reason
        raise RoundFailed(
            f"round {number}: {federation.chosen.name} failed to aggregate "
            f"{counted(tally.updates, 'update')}: {type(error).__name__}: {error}. The global "
            f"model is that of round {number - 1}."
        ) from error
    return arrays


def _most_of(*told: float | None) -> float | None:
    """The most that any client has said to have spent; None where none has said it."""
    return max((epsilon for epsilon in told if epsilon is not None), default=None)


def _record(
    federation: Federation,
    number: int,
    seconds: float,
    tally: Tally,
    metrics: dict[str, float],
    judged_on: str,
    sent: int,
) -> RoundRecord:
    return RoundRecord(
        round=number,
        rounds=federation.run.federation.rounds,
        seconds=seconds,
        cohort=tally.asked,
        updates=tally.updates,
        declined=tally.declined,
        failed=tally.failed,
        train_loss=tally.train_loss,
        metrics=metrics,
        judged_on=judged_on,
        epsilon_max=tally.epsilon_max,
        bytes_up=tally.bytes_up,
        bytes_down=sent,
        virtual=federation.virtual.virtual if federation.virtual else None,
        median_norm=tally.median_norm,
    )
