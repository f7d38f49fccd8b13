"""Federated rounds: select, send, check, aggregate, judge; the best model is kept."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property, partial

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
    sendable,
    weights_record,
)
from fedcore.updates.pack import Layout, Vector, layout_of, pack, unpack
from server.aggregation.exact import ExactMean
from server.cohort import asked_for, select
from server.inbound import (
    FoldingGrid,
    Tally,
    accepted,
    carry,
    check_quorum,
    fold,
    fold_in_place,
    hold,
    payload_bytes,
)
from server.progress import Forgetful, Keeper, Progress, Start
from server.records import RoundRecord
from server.strategies import Chosen
from server.strategy_state import remembered

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
    keeper: Keeper = field(default_factory=Forgetful)
    start: Start | None = None
    """Where to go on; from the beginning when None."""

    @cached_property
    def folding(self) -> FoldingGrid | None:
        """The grid, where it adds updates up itself and the strategy lets it."""
        folds = self.chosen.folds and self.asked == self.cohort
        return self.grid if folds and isinstance(self.grid, FoldingGrid) else None

    @cached_property
    def asked(self) -> int:
        """How many clients a round asks, where so many are there; ``cohort`` updates are enough."""
        return asked_for(self.run, self.cohort, simulated=self.virtual is not None)

    @cached_property
    def virtual(self) -> FoldingGrid | None:
        """The grid, where it may have a virtual clock."""
        return self.grid if isinstance(self.grid, FoldingGrid) else None


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
    keeper, layout = federation.keeper, layout_of(model.model)
    start = federation.start
    progress = _held_once(start.progress if start else _beginning(federation, model))
    records = list(start.records) if start else []
    unpack(progress.weights, model.model)
    while keeper.goes_on(progress) and not progress.over:
        started, number = time.monotonic(), progress.round + 1
        nodes = keeper.asked(MessageType.TRAIN, partial(_drawn, federation, number))
        tally = Tally(len(nodes))
        keeper.begin(nodes)
        try:
            arrays, sent = _train_round(federation, progress, layout, nodes, tally)
            arrays = sendable(arrays)
            if tally.over:
                _end_early(federation, number, tally)  # what was learnt before stands
                progress = replace(progress, over=True)
                continue
            metrics, judged_on = _judge_round(federation, model, layout, progress, arrays)
        except Exception:
            keeper.fail(progress)
            raise
        seconds = time.monotonic() - started
        records.append(_record(federation, number, seconds, tally, metrics, judged_on, sent))
        federation.on_round(records[-1])
        better = _is_better(federation.primary, records, progress.best_round)
        progress = replace(
            progress,
            round=number,
            weights=arrays,
            best=arrays if better else progress.best,
            best_round=number if better else progress.best_round,
            most_failed=max(progress.most_failed, tally.failed),
            strategy=remembered(federation.chosen.strategy),
        )
        progress = replace(progress, over=_is_over(federation, progress))
    unpack(progress.weights, model.model)
    return Federated(progress.best, progress.best_round, tuple(records))


def _drawn(federation: Federation, number: int) -> list[int]:
    found = federation.grid.get_node_ids()
    there = found if isinstance(found, Sequence) else list(found)
    size = max(federation.cohort, min(federation.asked, len(there)))
    return select(there, size, seed=federation.run.seed, words=("round", number))


def _beginning(federation: Federation, model: FullModel) -> Progress:
    weights = pack(model.model)
    return Progress(
        round=0,
        over=False,
        weights=weights,
        best=weights,
        best_round=0,
        most_failed=0,
        strategy=remembered(federation.chosen.strategy),
        preprocess=preprocess_bytes(model),
    )


def _held_once(progress: Progress) -> Progress:
    """The same, with weights that are sent from where they lie."""
    weights = sendable(progress.weights)
    best = weights if progress.best is progress.weights else progress.best
    return replace(progress, weights=weights, best=best)


def _announce(federation: Federation, progress: Progress, tally: Tally) -> None:
    """Says that clients failed, if more did than ever before.

    Not every round: a client that fails tends to fail again.
    """
    if tally.failed <= progress.most_failed:
        return
    advice = federation.keeper.failures(progress, tally.reasons)
    federation.on_note(
        f"round {progress.round + 1}: {tally.failed} of {tally.asked} clients failed. First: "
        f"{' '.join([tally.reasons[0], *advice])}"
    )


def _is_over(federation: Federation, progress: Progress) -> bool:
    """Whether the round that ended was the last; says so where more were planned."""
    settings = federation.run.federation
    if progress.round >= settings.rounds:
        return True
    if not settings.patience or progress.round - progress.best_round < settings.patience:
        return False
    federation.on_note(
        f"Stopped after round {progress.round}: none was better than round {progress.best_round} "
        f"for federation.patience = {settings.patience} rounds."
    )
    return True


def _is_better(primary: Metric, records: Sequence[RoundRecord], best_round: int) -> bool:
    latest = records[-1].metrics.get(primary.name)
    best = records[best_round - 1].metrics.get(primary.name) if best_round else None
    if latest is None or best is None or math.isnan(best):
        return True
    return primary.better(latest, best)


def _end_early(federation: Federation, number: int, tally: Tally) -> None:
    """Says that budgets are spent; that is an error where no client ever took part."""
    if number == 1:
        raise BudgetExhausted(
            f"round 1: all {tally.declined} clients declined. Nothing was trained; raise "
            "privacy.max_epsilon or privacy.noise_multiplier, or take fewer client.epochs. Last: "
            f"{tally.spent}"
        )
    spent = "all" if tally.all_declined else f"{tally.declined} of"
    federation.on_note(
        f"Ended before round {number}: the privacy budget of {spent} {tally.asked} clients asked "
        "is spent."
    )


def instructions(
    federation: Federation, progress: Progress, layout: Layout, nodes: Sequence[int]
) -> list[Message]:
    """What the strategy sends to ``nodes`` in the round after ``progress``."""
    number = progress.round + 1
    # What folds draws nothing but the cohort, and of that it is shown all there is.
    with nullcontext() if federation.folding else _streams(federation, number, "configure"):
        return list(
            federation.chosen.strategy.configure_train(
                number,
                weights_record(progress.weights),
                instruction_config(layout, progress.preprocess),
                CohortGrid(federation.grid, nodes),
            )
        )


def _train_round(
    federation: Federation,
    progress: Progress,
    layout: Layout,
    nodes: Sequence[int],
    tally: Tally,
) -> tuple[Vector, int]:
    """One round of training: the new weights, and the bytes sent; the rest is told to ``tally``."""
    run, strategy, number = federation.run, federation.chosen.strategy, progress.round + 1
    grid, folds = federation.grid, federation.chosen.folds
    in_place = federation.folding
    # A strategy that folds tells every node the same: one message stands for all.
    messages = instructions(federation, progress, layout, nodes[:1] if in_place else nodes)
    uniform, deadline_s = run.federation.weighting == "uniform", run.federation.deadline_s
    mean: ExactMean | None = None
    ready: list[Message] = []
    if in_place:
        sent = payload_bytes(messages[0]) * len(nodes)
        mean = fold_in_place(
            in_place, messages[0], nodes, tally, uniform=uniform, deadline_s=deadline_s
        )
    else:
        messages.sort(key=lambda message: message.metadata.dst_node_id)
        sent = sum(payload_bytes(message) for message in messages)
        replies = grid.send_and_receive(messages, timeout=deadline_s)
        taken = accepted(replies, layout, tally, first=federation.cohort)
        del replies  # whoever is late is forgotten once enough are taken
        if folds:
            mean = fold(taken, layout, tally, uniform=uniform)
        else:
            ready = hold(taken, tally, uniform=uniform)
    _announce(federation, progress, tally)
    check_quorum(tally, run.federation.quorum, federation.cohort, number)
    if tally.over or not tally.updates:
        return progress.weights, sent
    if mean is not None and federation.chosen.means:
        return check_weights(mean.mean(), layout, where="aggregate"), sent
    if mean is not None:
        ready = [carry(mean, messages[0])]
    try:
        with nullcontext() if in_place else _streams(federation, number, "aggregate"):
            arrays, _ = strategy.aggregate_train(number, ready)
    except FedcoreError:
        raise
    except Exception as error:  # Flower's strategy refused: a plain error with its reason
        raise RoundFailed(
            f"round {number}: {type(strategy).__name__} failed to aggregate {tally.updates} "
            f"updates: {type(error).__name__}: {error}. The global model is that of round "
            f"{number - 1}."
        ) from error
    return progress.weights if arrays is None else _checked(arrays, layout, number), sent


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
            reasons.append(reply.error.reason or f"error {reply.error.code}")
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
        train_loss=tally.loss / tally.examples if tally.has_loss else None,
        metrics=metrics,
        judged_on=judged_on,
        epsilon_max=tally.epsilon_max,
        bytes_up=tally.bytes_up,
        bytes_down=sent,
        virtual=federation.virtual.virtual if federation.virtual else None,
    )


def _streams(federation: Federation, number: int, step: str) -> AbstractContextManager[None]:
    """Pins the streams that Flower's strategies draw from, in a simulation."""
    if federation.randomness.origin == "simulated":
        return federation.randomness.library_streams("strategy", step, number)
    return nullcontext()
