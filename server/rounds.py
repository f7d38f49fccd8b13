"""Federated rounds: select, send, check, aggregate, judge; the best model is kept."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property, partial

from flwr.app import ArrayRecord, Message, MessageType
from flwr.serverapp import Grid

from fedcore.config import RunConfig
from fedcore.errors import FedcoreError, RoundFailed
from fedcore.flower.grid import CohortGrid
from fedcore.metrics import Metric
from fedcore.model import FullModel, preprocess_bytes
from fedcore.observability.words import counted
from fedcore.seeds import Randomness
from fedcore.updates.messages import (
    check_weights,
    instruction_config,
    joined,
    sendable,
    weights_record,
)
from fedcore.updates.pack import Layout, Vector, layout_of, pack, unpack
from server.aggregation.exact import ExactMean
from server.client_privacy import Released, bound_of, draw, draws_of, epsilon, protect, release
from server.cohort import asked_for, select
from server.endings import announce, end_early, is_over
from server.evaluation import is_better, judge_round
from server.expected import asked_to_train
from server.inbound import (
    FoldingGrid,
    Intake,
    Tally,
    accepted,
    aggregated,
    carry,
    fold_in_place,
    payload_bytes,
)
from server.norms import is_bounded, norm_bound
from server.progress import Forgetful, Keeper, Nameless, Peers, Progress, Start
from server.protection import Protection
from server.quorum import check_quorum
from server.records import RoundRecord
from server.strategies import Chosen
from server.strategy_state import remembered
from server.taken import fold, hold

Judge = Callable[[FullModel], dict[str, float]]


@dataclass(frozen=True)
class Federation:
    """What rounds run with; fixed before the first."""

    run: RunConfig
    grid: Grid
    chosen: Chosen
    cohort: int
    metrics: tuple[Metric, ...]
    """Of the task; the first is its primary one."""
    randomness: Randomness
    judge: Judge | None
    """Scores a model on the cloud's data; None when there is none."""
    on_round: Callable[[RoundRecord], None]
    on_note: Callable[[str], None]
    keeper: Keeper = field(default_factory=Forgetful)
    start: Start | None = None
    """Where to go on; from the beginning when None."""
    peers: Peers = field(default_factory=Nameless)
    """Who clients are."""
    live: bool = False
    """Whether they are devices, whose updates are bounded unless the run says otherwise."""
    clients: int = 0
    """Those that rounds draw from, as client-level privacy counts on; as many as are there, or
    as a round asks, where those are more."""

    @property
    def primary(self) -> Metric:
        """What rounds are compared by."""
        return self.metrics[0]

    @cached_property
    def folding(self) -> FoldingGrid | None:
        """The grid, where it adds updates up itself and the strategy lets it."""
        bounded = is_bounded(self.run, live=self.live)  # which looks at each update
        folds = self.chosen.folds and self.asked == self.cohort and not bounded
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
    keeper, layout = federation.keeper, layout_of(model.model)
    start = federation.start
    progress = _held_once(start.progress if start else _beginning(federation, model))
    records = list(start.records) if start else []
    most = _most_of(*(each.epsilon_max for each in records))
    unpack(progress.weights, model.model)
    while keeper.goes_on(progress) and not progress.over:
        started, number = time.monotonic(), progress.round + 1
        nodes = keeper.asked(MessageType.TRAIN, partial(_drawn, federation, progress))
        tally = Tally(len(nodes))
        keeper.begin(nodes)
        try:
            released, sent = _train_round(federation, progress, records, layout, nodes, tally)
            arrays = sendable(released.weights)
            if tally.over:
                end_early(federation, number, tally)  # what was learnt before stands
                progress = replace(progress, over=True)
                continue
            metrics, judged_on = judge_round(federation, model, layout, progress, arrays)
        except Exception:
            keeper.fail(progress)
            raise
        seconds = time.monotonic() - started
        protection = released.protection
        spent = epsilon(federation.run, protection, rounds=number) if protection else None
        record = _record(federation, number, seconds, tally, metrics, judged_on, sent)
        most = _most_of(most, record.epsilon_max)
        records.append(replace(record, epsilon_max=most, client_epsilon=spent))
        federation.on_round(records[-1])
        better = is_better(federation.primary, records, progress.best_round)
        progress = replace(
            progress,
            round=number,
            weights=arrays,
            best=arrays if better else progress.best,
            best_round=number if better else progress.best_round,
            most_failed=max(progress.most_failed, tally.failed),
            strategy=remembered(federation.chosen.strategy),
            protection=protection,
            spent=progress.spent | tally.spent_nodes if federation.live else progress.spent,
        )
        progress = replace(progress, over=is_over(federation, progress))
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
        strategy=remembered(federation.chosen.strategy),
        preprocess=preprocess_bytes(model),
        protection=protection,
    )


def _held_once(progress: Progress) -> Progress:
    """The same, with weights that are sent from where they lie."""
    weights = sendable(progress.weights)
    best = weights if progress.best is progress.weights else progress.best
    return replace(progress, weights=weights, best=best)


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
                instruction_config(
                    layout,
                    progress.preprocess,
                    clip_norm=progress.protection.clip_norm if progress.protection else 0.0,
                ),
                CohortGrid(federation.grid, nodes),
            )
        )


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
    in_place = federation.folding
    # A strategy that folds tells every node the same: one message stands for all. Even where nobody
    # was drawn it is asked for one, as it may remember what it sends.
    shown = nodes[:1] if in_place else nodes
    messages = instructions(federation, progress, layout, shown or _there(federation)[:1])
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
            in_place, messages[0], nodes, tally, uniform=uniform, deadline_s=deadline_s
        )
    else:
        messages.sort(key=lambda message: message.metadata.dst_node_id)
        sent = sum(payload_bytes(message) for message in messages)
        replies = grid.send_and_receive(messages, timeout=deadline_s)
        enough = len(nodes) if protection else federation.cohort
        intake = Intake(
            asked_to_train(run, layout),
            keeper=federation.keeper,
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
        weights = joined(mean.mean_parts(), layout.size)
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
        with nullcontext() if federation.folding else _streams(federation, number, "aggregate"):
            arrays, _ = strategy.aggregate_train(number, ready)
    except FedcoreError:
        raise
    except Exception as error:  # Flower's strategy refused: a plain error with its reason
        raise RoundFailed(
            f"round {number}: {type(strategy).__name__} failed to aggregate "
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


def _streams(federation: Federation, number: int, step: str) -> AbstractContextManager[None]:
    """Pins the streams that Flower's strategies draw from, in a simulation."""
    if federation.randomness.origin == "simulated":
        return federation.randomness.library_streams("strategy", step, number)
    return nullcontext()
