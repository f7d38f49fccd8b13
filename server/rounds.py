"""Federated rounds: select, send, check, aggregate, judge; the best model is kept."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
from flwr.app import ArrayRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid

from fedcore.config import RunConfig
from fedcore.errors import BudgetExhausted, FedcoreError, InvalidUpdate, RoundFailed
from fedcore.flower.grid import CohortGrid
from fedcore.metrics import Metric
from fedcore.model import FullModel, preprocess_bytes
from fedcore.seeds import Randomness
from fedcore.updates.messages import (
    ARRAYS,
    CONFIG,
    MODEL,
    check_weights,
    instruction_config,
    read_metrics,
    weights_record,
)
from fedcore.updates.pack import Layout, Vector, layout_of, pack, unpack
from server.cohort import select
from server.inbound import Tally, accepted, check_quorum, fold, hold, payload_bytes
from server.records import RoundRecord
from server.strategies import Chosen

Judge = Callable[[FullModel], dict[str, float]]


@dataclass(frozen=True)
class Federation:
    """What rounds run with; fixed before the first."""

    run: RunConfig
    grid: Grid
    chosen: Chosen
    cohort: int
    primary: Metric
    randomness: Randomness
    judge: Judge | None
    """Scores a model on the cloud's data; None when there is none."""
    on_round: Callable[[RoundRecord], None]
    on_note: Callable[[str], None]


@dataclass(frozen=True)
class Federated:
    """What rounds leave: the best global model and the story of how it came about."""

    weights: Vector
    best_round: int
    rounds: tuple[RoundRecord, ...]


def run_rounds(federation: Federation, model: FullModel) -> Federated:
    """Runs every round and returns the best model; ``model`` is left holding the last one.

    Rounds are judged on the cloud's data, or on what clients hold back, or, where there
    is neither, not at all: then the last round counts as the best.

    Raises:
        RoundFailed: a round got fewer updates than its quorum.
        BudgetExhausted: no client's budget allows even the first round.
    """
    run, layout = federation.run, layout_of(model.model)
    records: list[RoundRecord] = []
    best, best_round, most_failed = pack(model.model), 0, 0
    for number in range(1, run.federation.rounds + 1):
        started = time.monotonic()
        tally, arrays, sent = _train_round(federation, model, layout, number)
        if tally.failed > most_failed:  # not every round: a client that fails tends to fail again
            most_failed = tally.failed
            federation.on_note(
                f"round {number}: {tally.failed} of {federation.cohort} clients failed. First: "
                f"{tally.reasons[0]}"
            )
        if not tally.updates and tally.declined:
            _end_early(federation, number, tally)
            break  # what was learnt before stands
        unpack(arrays, model.model)
        metrics, judged_on = _judge_round(federation, model, layout, number)
        records.append(
            _record(federation, number, time.monotonic() - started, tally, metrics, judged_on, sent)
        )
        federation.on_round(records[-1])
        if _is_better(federation.primary, records, best_round):
            best, best_round = arrays, number
        elif run.federation.patience and number - best_round >= run.federation.patience:
            federation.on_note(
                f"Stopped after round {number}: none was better than round {best_round} for "
                f"federation.patience = {run.federation.patience} rounds."
            )
            break
    return Federated(best, best_round, tuple(records))


def _is_better(primary: Metric, records: Sequence[RoundRecord], best_round: int) -> bool:
    latest = records[-1].metrics.get(primary.name)
    best = records[best_round - 1].metrics.get(primary.name) if best_round else None
    if latest is None or best is None or math.isnan(best):
        return True
    return primary.better(latest, best)


def _end_early(federation: Federation, number: int, tally: Tally) -> None:
    """Says that every client declined; that is an error where none ever took part."""
    if number == 1:
        raise BudgetExhausted(
            f"round 1: all {tally.declined} clients declined. Nothing was trained; raise "
            "privacy.max_epsilon or privacy.noise_multiplier, or take fewer client.epochs. Last: "
            f"{tally.spent}"
        )
    federation.on_note(
        f"Ended before round {number}: the privacy budget of all {tally.declined} clients asked is "
        "spent."
    )


def _train_round(
    federation: Federation, model: FullModel, layout: Layout, number: int
) -> tuple[Tally, Vector, int]:
    """One round of training: what came back, the new weights, and the bytes sent."""
    run, strategy = federation.run, federation.chosen.strategy
    words = ("round", number)
    nodes = select(federation.grid.get_node_ids(), federation.cohort, seed=run.seed, words=words)
    weights = pack(model.model)
    with _streams(federation, number, "configure"):
        messages = list(
            strategy.configure_train(
                number,
                weights_record(weights),
                instruction_config(layout, preprocess_bytes(model)),
                CohortGrid(federation.grid, nodes),
            )
        )
    messages.sort(key=lambda message: message.metadata.dst_node_id)
    sent = sum(payload_bytes(message) for message in messages)
    replies = federation.grid.send_and_receive(messages, timeout=run.federation.deadline_s)
    tally = Tally()
    taken = accepted(replies, layout, tally)
    uniform = run.federation.weighting == "uniform"
    if federation.chosen.folds:
        ready = fold(taken, layout, tally, uniform=uniform)
    else:
        ready = hold(taken, tally, uniform=uniform)
    check_quorum(tally, run.federation.quorum, federation.cohort, number)
    if not tally.updates:
        return tally, weights, sent
    try:
        with _streams(federation, number, "aggregate"):
            arrays, _ = strategy.aggregate_train(number, ready)
    except FedcoreError:
        raise
    except Exception as error:  # Flower's strategy refused: a plain error with its reason
        raise RoundFailed(
            f"round {number}: {type(strategy).__name__} failed to aggregate {tally.updates} "
            f"updates: {type(error).__name__}: {error}. The global model is that of round "
            f"{number - 1}."
        ) from error
    return tally, weights if arrays is None else _checked(arrays, layout, number), sent


def _checked(arrays: ArrayRecord, layout: Layout, number: int) -> Vector:
    try:
        # FedMedian and others compute in float64.
        weights = arrays[MODEL].numpy().astype(np.float32, copy=False)
        return check_weights(weights, layout, where="aggregate")
    except InvalidUpdate as error:
        raise RoundFailed(
            f"round {number}: {error} The global model is that of round {number - 1}; lower the "
            "strategy's learning rate."
        ) from None


def _judge_round(
    federation: Federation, model: FullModel, layout: Layout, number: int
) -> tuple[dict[str, float], str]:
    size = federation.run.federation.evaluate_cohort
    if size:
        return _evaluate_on_clients(federation, model, layout, number, size), "clients"
    if federation.judge:
        return federation.judge(model), "cloud"
    return {}, "nothing"


def _evaluate_on_clients(
    federation: Federation, model: FullModel, layout: Layout, number: int, size: int
) -> dict[str, float]:
    """Means over some clients' held-out data, each weighed by its number of examples."""
    run = federation.run
    nodes = select(
        federation.grid.get_node_ids(),
        min(size, len(list(federation.grid.get_node_ids()))),
        seed=run.seed,
        words=("evaluation", number),
    )
    config = instruction_config(layout, preprocess_bytes(model))
    config["server-round"] = number
    record = RecordDict({ARRAYS: weights_record(pack(model.model)), CONFIG: config})
    messages = [Message(record, node, MessageType.EVALUATE) for node in nodes]
    sums: dict[str, float] = {}
    total, reasons = 0, []
    for reply in federation.grid.send_and_receive(messages, timeout=run.federation.deadline_s):
        if reply.has_error():
            reasons.append(reply.error.reason or f"error {reply.error.code}")
            continue
        try:
            count, values = read_metrics(reply, where=f"node {reply.metadata.src_node_id}")
        except InvalidUpdate as error:
            reasons.append(str(error))
            continue
        total += count
        for name, value in values.items():
            sums[name] = sums.get(name, 0.0) + value * count
    if not total:
        raise RoundFailed(
            f"round {number}: none of {len(nodes)} clients could be evaluated. First: "
            f"{'; '.join(reasons[:1]) or 'no reply came before the deadline'}"
        )
    return {name: value / total for name, value in sums.items()}


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
        cohort=federation.cohort,
        updates=tally.updates,
        declined=tally.declined,
        failed=tally.failed,
        train_loss=tally.loss / tally.examples if tally.has_loss else None,
        metrics=metrics,
        judged_on=judged_on,
        epsilon_max=tally.epsilon_max,
        bytes_up=tally.bytes_up,
        bytes_down=sent,
    )


def _streams(federation: Federation, number: int, step: str) -> AbstractContextManager[None]:
    """Pins the streams that Flower's strategies draw from, in a simulation."""
    if federation.randomness.origin == "simulated":
        return federation.randomness.library_streams("strategy", step, number)
    return nullcontext()
