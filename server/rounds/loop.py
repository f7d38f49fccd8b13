"""The round loop: select a cohort, send, check, aggregate, evaluate, commit; keep the best model.

`run_rounds` takes a `Federation` and the initial model, and returns the best model with one record
per round.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial

from flwr.app import MessageType

from fedcore.task.model import FullModel, preprocess_bytes
from fedcore.updates.frozen import frozen_state
from fedcore.updates.messages import sendable
from fedcore.updates.pack import Layout, Vector, layout_of, pack, unpack
from server.records import RoundRecord
from server.rounds.checkpointing.progress import Progress
from server.rounds.client_privacy.mechanism import draw, draws_of, epsilon, protect
from server.rounds.client_privacy.protection import Protection
from server.rounds.cohort import Cohort, quorum_of, select
from server.rounds.endings import end_early, is_over
from server.rounds.evaluation.evaluate import (
    RoundEvaluation,
    announce_undefined,
    evaluate_round,
    is_better,
)
from server.rounds.federation import Federation
from server.rounds.inbound import Tally
from server.rounds.strategies.state import strategy_state_of
from server.rounds.training import Sent, train_round
from server.rounds.tuning import is_due, tune


@dataclass(frozen=True)
class Federated:
    """Result of all rounds: the best global model and the record of each round."""

    weights: Vector
    best_round: int
    rounds: tuple[RoundRecord, ...]
    protection: Protection | None = None
    """State of client-level privacy after the last round; None where the run does not use it."""


def run_rounds(federation: Federation, model: FullModel) -> Federated:
    """Runs every remaining round and returns the best model.

    Leaves the last round's weights in ``model``. A round is evaluated on the data that clients hold
    out, else on the cloud's data. Where there is neither, it is not evaluated, and the last round
    counts as the best.

    Raises:
        RoundFailed: a round got fewer updates than its quorum.
        BudgetExhausted: no client's budget allows even the first round.
    """
    checkpointer, layout = federation.checkpointer, layout_of(model.model)
    start = federation.start
    progress = _in_send_buffer(start.progress if start else _initial_progress(federation, model))
    records = list(start.records) if start else []
    epsilon_max = _largest(*(each.epsilon_max for each in records))
    unpack(progress.weights, model.model)
    checkpointer.commit(progress, None)
    while True:
        checkpointer.wait_if_paused(progress)
        if progress.over or checkpointer.stops_after(progress):
            break
        started, number = time.monotonic(), progress.round + 1
        cohort = checkpointer.cohort(MessageType.TRAIN, partial(_draw_cohort, federation, progress))
        tally = Tally(len(cohort.nodes))
        checkpointer.begin(cohort.nodes)
        try:
            released, sent = train_round(federation, progress, records, layout, cohort, tally)
            arrays = sendable(released.weights)
            if tally.over:
                end_early(federation, number, tally)  # keeps the model of the last round
                progress = replace(progress, over=True)
                checkpointer.commit(progress, None)
                continue
            judged = evaluate_round(federation, model, layout, progress, arrays)
        except Exception:
            checkpointer.fail(progress)
            raise
        seconds = time.monotonic() - started
        protection = released.protection
        spent = epsilon(federation.run, protection, rounds=number) if protection else None
        record = _record(federation, number, seconds, tally, judged, sent)
        epsilon_max = _largest(epsilon_max, record.epsilon_max)
        record = federation.annotate(replace(record, epsilon_max=epsilon_max, client_epsilon=spent))
        announce_undefined(federation, records, number, judged)
        better = is_better(federation.primary, [*records, record], progress.best_round)
        best_round = number if better else progress.best_round
        weights, record = _tuned(federation, model, layout, arrays, [*records, record], best_round)
        records.append(record)
        federation.on_round(record)
        progress = replace(
            progress,
            round=number,
            weights=weights,
            best=arrays if better else progress.best,
            best_round=best_round,
            most_failed=max(progress.most_failed, tally.failed),
            strategy=strategy_state_of(federation.chosen.strategy),
            protection=protection,
            spent=progress.spent | tally.spent_nodes if federation.live else progress.spent,
        )
        progress = replace(progress, over=is_over(federation, progress))
        checkpointer.commit(progress, record)
    unpack(progress.weights, model.model)
    return Federated(progress.best, progress.best_round, tuple(records), progress.protection)


def _tuned(
    federation: Federation,
    model: FullModel,
    layout: Layout,
    weights: Vector,
    records: Sequence[RoundRecord],
    best_round: int,
) -> tuple[Vector, RoundRecord]:
    """Fine-tunes the weights of the last round if it is due; returns the next ones and its record.

    The model of the best round stays what the round gave: its metrics are those of that model.
    """
    record = records[-1]
    due = is_due(federation.run.finetune, records, best_round)
    if federation.tuner is None or not due:
        return weights, record
    started = time.monotonic()
    found, kept = tune(federation, model, layout, weights, number=record.round)
    seconds = record.seconds + time.monotonic() - started
    return sendable(found) if kept else weights, replace(record, finetuned=kept, seconds=seconds)


def _draw_cohort(federation: Federation, progress: Progress, *, short: bool = False) -> Cohort:
    connected, number = federation.nodes(), progress.round + 1
    if progress.protection is not None:
        draws = draws_of(federation.randomness, "cohort", number)
        nodes = draw(federation.run, progress.protection, connected, draws, number=number)
    else:
        connected = _unspent_first(connected, progress.spent, federation.cohort)
        size = max(federation.cohort, min(federation.selection_size, len(connected)))
        least = quorum_of(federation.run.federation.quorum, federation.cohort) if short else None
        words = ("round", number)
        nodes = select(connected, size, seed=federation.run.seed, words=words, least=least)
    return Cohort(nodes, federation.peers.weights(nodes))


def _unspent_first(connected: Sequence[int], spent: Collection[int], cohort: int) -> Sequence[int]:
    """Returns online nodes whose privacy budget is not known to be spent.

    Where they are fewer than a cohort, nodes with a spent budget fill it up.
    """
    if not spent:
        return connected
    rest = [node for node in connected if node not in spent]
    return [*rest, *(node for node in connected if node in spent)][: max(cohort, len(rest))]


def _initial_progress(federation: Federation, model: FullModel) -> Progress:
    run, weights, protection = federation.run, pack(model.model), None
    if run.client_private:
        clients = max(federation.clients, len(federation.nodes()), federation.cohort)
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
        frozen=frozen_state(model.model),
        protection=protection,
    )


def _in_send_buffer(progress: Progress) -> Progress:
    """Returns the progress with its weights in the buffer that messages are sent from.

    The weights are then in memory once, not twice.
    """
    weights = sendable(progress.weights)
    best = weights if progress.best is progress.weights else progress.best
    return replace(progress, weights=weights, best=best)


def _largest(*epsilons: float | None) -> float | None:
    """Returns the largest epsilon that any client reported; None where none reported one."""
    return max((epsilon for epsilon in epsilons if epsilon is not None), default=None)


def _record(
    federation: Federation,
    number: int,
    seconds: float,
    tally: Tally,
    judged: RoundEvaluation,
    sent: Sent,
) -> RoundRecord:
    return RoundRecord(
        round=number,
        rounds=federation.run.federation.rounds,
        seconds=seconds,
        cohort=tally.selected,
        updates=tally.updates,
        declined=tally.declined,
        failed=tally.failed,
        train_loss=tally.train_loss,
        metrics=judged.metrics,
        judged_on=judged.judged_on,
        sources=judged.sources,
        epsilon_max=tally.epsilon_max,
        bytes_up=tally.bytes_up,
        bytes_down=sent.bytes_down,
        median_norm=tally.median_norm,
        client=dict(sent.client),
    )
