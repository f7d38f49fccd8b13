"""Rounds over made-up clients, and what they tell, for tests."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, Error, Message, MetricRecord, RecordDict
from torch import nn

from fedcore.config.run import RunConfig
from fedcore.flower.grid import InProcessGrid
from fedcore.flower.identity import assume_identity
from fedcore.seeds import Simulated
from fedcore.task.measured import Measured
from fedcore.task.metrics import ACCURACY, Metric
from fedcore.task.model import FullModel
from fedcore.updates.evaluation import evaluation_content
from fedcore.updates.messages import (
    ARRAYS,
    CONFIG,
    METRICS,
    MODEL,
    NUM_EXAMPLES,
    REFUSED,
    Update,
    update_content,
)
from fedcore.updates.pack import Vector, pack, unpack
from server.records import RoundRecord
from server.rounds.checkpointing.progress import Progress, Start
from server.rounds.federation import Federation
from server.rounds.loop import Federated, run_rounds
from server.rounds.roles import Roles
from server.rounds.strategies.flower import make_strategy
from server.rounds.strategies.state import strategy_state_of
from server.rounds.tuning import Tuner

NODES = list(range(10, 15))
Answer = Callable[[int, int, Vector], RecordDict | Error]
"""What a node answers, given its number, the round and the weights that it was sent."""


def zeros() -> FullModel:
    """Two inputs, one output: three weights, all zero."""
    model = nn.Linear(2, 1)
    unpack(np.zeros(3, np.float32), model)
    return FullModel(nn.Identity(), model)


def adds(step: float = 1.0, *, count: int = 10, **metrics: float) -> Answer:
    return lambda node, number, weights: update_content(
        Update(weights + np.float32(step), count, metrics)
    )


def mixed(usual: Answer, **others: Answer) -> Answer:
    """Some nodes answer otherwise: ``n10=...``."""
    return lambda node, number, weights: others.get(f"n{node}", usual)(node, number, weights)


class Story:
    """A federation over made-up clients, and what it told."""

    def __init__(
        self,
        answer: Answer,
        *,
        judge: Callable[[FullModel], Measured] | None = None,
        primary: Metric = ACCURACY,
        metrics: tuple[Metric, ...] = (),
        evaluate: Answer | None = None,
        client_seconds: float = 0.0,
        strategy: str = "FedAvg",
        options: dict[str, Any] | None = None,
        live: bool = False,
        unit: str = "none",
        tuner: Tuner | None = None,
        finetune: dict[str, Any] | None = None,
        name_of: Callable[[int], str] | None = None,
        **federation: Any,
    ) -> None:
        assume_identity(1)
        self.records: list[RoundRecord] = []
        self.notes: list[str] = []
        self.asked: list[tuple[int, int]] = []
        run = RunConfig.model_validate(
            {
                "name": "run",
                "task": "task.py",
                "federation": {"rounds": 3} | federation,
                "privacy": {"unit": unit},
                "finetune": finetune or {},
            }
        )

        def handle(message: Message) -> Message:
            time.sleep(client_seconds)
            node = message.metadata.dst_node_id
            number = int(str(message.content.config_records[CONFIG]["server-round"]))
            weights = message.content.array_records[ARRAYS][MODEL].numpy()
            if message.metadata.message_type == "train":
                self.asked.append((number, node))
                return Message(answer(node, number, weights), reply_to=message)
            assert evaluate is not None
            return Message(evaluate(node, number, weights), reply_to=message)

        cohort = run.federation.cohort or len(NODES)
        self._federation = Federation(
            run=run,
            grid=InProcessGrid(1, NODES, handle),
            chosen=make_strategy(strategy, options or {}, cohort=cohort, size=3),
            cohort=cohort,
            metrics=metrics or (primary,),
            randomness=Simulated(0),
            evaluate_on_cloud=judge,
            on_round=self.records.append,
            on_note=self.notes.append,
            live=live,
            outputs=(2,),
            tuner=tuner,
            roles=Roles(run.federation, name_of) if name_of is not None else None,
        )
        self.model = zeros()

    def run(self, start: Start | None = None) -> Federated:
        return run_rounds(replace(self._federation, start=start), self.model)

    def progress(self, *, round: int) -> Progress:
        """As after a round that left the weights of the beginning."""
        weights = pack(self.model.model)
        strategy = strategy_state_of(self._federation.chosen.strategy)
        return Progress(round, False, weights, weights, round, 0, strategy, b"")


def scores(*values: float) -> Callable[[FullModel], Measured]:
    """A judge that gives these scores, one a round; NaN for one that is undefined."""
    left = iter(values)

    def judge(model: FullModel) -> Measured:
        accuracy = next(left)
        if math.isnan(accuracy):
            return Measured(1, values={"rmse": 1.0}, undefined={"accuracy": "it is nan"})
        return Measured(1, values={"accuracy": accuracy, "rmse": 1.0})

    return judge


def records_of(array: np.ndarray[Any, Any], **metrics: Any) -> RecordDict:
    return RecordDict(
        {
            ARRAYS: ArrayRecord({MODEL: Array(array)}),
            METRICS: MetricRecord({NUM_EXAMPLES: 10} | metrics),
        }
    )


BAD: dict[str, Answer] = {
    "NaN": adds(float("nan")),
    "infinite": adds(float("inf")),
    "another shape": lambda *_: records_of(np.zeros(4, np.float32)),
    "another dtype": lambda *_: records_of(np.zeros(3)),
    "no examples": lambda *_: records_of(np.zeros(3, np.float32), **{NUM_EXAMPLES: 0}),
    "a trillion examples": lambda *_: records_of(np.zeros(3, np.float32), **{NUM_EXAMPLES: 10**12}),
    "negative examples": lambda *_: records_of(np.zeros(3, np.float32), **{NUM_EXAMPLES: -9}),
    "a loss that is NaN": adds(train_loss=float("nan")),
    "nothing": lambda *_: RecordDict(),
    "an error": lambda *_: Error(REFUSED, "client 'x': it broke"),
    "an error without a reason": lambda *_: Error(7),
    "a metric that was not asked for": adds(accuracy=1.0),
    "a loss out of its range": adds(train_loss=1e300),
}


def measured(count: int = 10, **values: Any) -> Answer:
    """An answer of a client that evaluates: sums by metric, or a value, or the reason for none."""
    sums = {name: np.array(each, float) for name, each in values.items() if isinstance(each, list)}
    found = {name: each for name, each in values.items() if isinstance(each, float)}
    undefined = {name: each for name, each in values.items() if isinstance(each, str)}
    return lambda *_: evaluation_content(Measured(count, sums, found, undefined))


def right(share: float, count: int = 10) -> Answer:
    """An answer of a client whose accuracy this is."""
    return measured(count, accuracy=[share * count, (1 - share) * count])
