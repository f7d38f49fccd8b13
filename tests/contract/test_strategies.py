"""Every strategy that Flower has, end to end; a new one shows up here by itself."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, Message

from fedcore.config.run import RunConfig
from fedcore.errors import ConfigError
from fedcore.flower.grid import CohortGrid, InProcessGrid
from fedcore.flower.identity import assume_identity
from fedcore.seeds import Simulated, numpy_rng
from fedcore.task.definition import Task
from fedcore.task.model import build_model
from fedcore.updates.messages import ARRAYS, MODEL, Update, update_content, weights_record
from fedcore.updates.pack import Vector, pack
from server.rounds.aggregation.exact_mean import ExactMean
from server.rounds.app import Outcome
from server.rounds.federation import Federation
from server.rounds.inbound import mean_as_reply
from server.rounds.loop import run_rounds
from server.rounds.strategies.flower import FOLDING, make_strategy, strategy_names

TREES = ["FedXgbBagging", "FedXgbCyclic"]
NETWORKS = [name for name in strategy_names() if name not in TREES]
FOLDED = [cls.__name__ for cls in FOLDING]
OPTIONS: dict[str, dict[str, Any]] = {
    "QFedAvg": {"client_learning_rate": 0.1},
    "DifferentialPrivacyServerSideFixedClipping": {"noise_multiplier": 0.1, "clipping_norm": 1.0},
    "DifferentialPrivacyClientSideFixedClipping": {"noise_multiplier": 0.1, "clipping_norm": 1.0},
    "DifferentialPrivacyServerSideAdaptiveClipping": {"noise_multiplier": 0.1},
    "DifferentialPrivacyClientSideAdaptiveClipping": {"noise_multiplier": 0.1},
    "FedProx": {"proximal_mu": 0.1},
}
Federate = Callable[..., Outcome]


def process_state() -> tuple[Any, bytes, bytes]:
    keys = np.random.get_state()[1]
    assert isinstance(keys, np.ndarray)
    return random.getstate(), keys.tobytes(), torch.get_rng_state().numpy().tobytes()


def run_with(name: str, federate: Federate, **more: Any) -> Outcome:
    return federate(strategy=name, strategy_options=OPTIONS.get(name, {}), **more)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_strategy_trains_a_finite_model_that_the_seed_fixes(
    name: str, federate: Federate, tiny: Task
) -> None:
    before = process_state()
    one, again = (run_with(name, federate) for _ in range(2))
    assert process_state() == before
    start = pack(build_model(tiny, RunConfig(name="run", task="task.py", seed=1)).model)
    end = one.federated.weights
    assert end.dtype == np.float32
    assert np.isfinite(end).all()
    assert not np.array_equal(end, start)
    assert again.federated.weights.tobytes() == end.tobytes()
    assert pack(one.model.model).tobytes() == end.tobytes()
    records = one.federated.rounds
    assert [record.updates for record in records] == [6, 6]
    assert all(record.bytes_up == record.bytes_down > 4 * len(end) for record in records)


@pytest.mark.parametrize("name", ["FedAvg", "FedMedian"])
def test_another_seed_gives_another_model(name: str, federate: Federate) -> None:
    one, other = (run_with(name, federate, seed=seed, rounds=1) for seed in (1, 2))
    assert one.federated.weights.tobytes() != other.federated.weights.tobytes()


@pytest.mark.parametrize("name", TREES)
def test_strategies_of_trees_are_refused_with_the_reason(name: str, federate: Federate) -> None:
    with pytest.raises(ConfigError, match=f"'{name}': it aggregates XGBoost trees"):
        run_with(name, federate)


Order = Callable[[list[Message]], list[Message]]


class Reordering(InProcessGrid):
    """Answers with made-up updates, in the order that a test asks for."""

    def __init__(self, order: Order) -> None:
        assume_identity(1)
        super().__init__(1, range(10, 16), self._answer)
        self._order = order

    def _answer(self, message: Message) -> Message:
        node = message.metadata.dst_node_id
        weights = message.content.array_records[ARRAYS][MODEL].numpy()
        number = int(str(message.content.config_records["config"]["server-round"]))
        step = numpy_rng(0, "update", node, number).standard_normal(weights.shape)
        update = Update(weights + 0.1 * step.astype(np.float32), 10 * node + number, {})
        return Message(update_content(update), reply_to=message)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterator[Message]:
        yield from self._order(list(super().send_and_receive(messages, timeout=timeout)))


def after_three_rounds(name: str, task: Task, order: Order = list, *, folds: bool = True) -> Vector:
    run = RunConfig.model_validate({"name": "run", "task": "x", "federation": {"rounds": 3}})
    chosen = make_strategy(name, OPTIONS.get(name, {}), cohort=6, size=1)
    assert chosen.folds
    federation = Federation(
        run=run,
        grid=Reordering(order),
        chosen=replace(chosen, folds=folds),
        cohort=6,
        metrics=task.metrics,
        randomness=Simulated(0),
        evaluate_on_cloud=None,
        on_round=lambda record: None,
        on_note=lambda note: None,
    )
    return run_rounds(federation, build_model(task, run)).weights


@pytest.mark.parametrize("name", FOLDED)
def test_a_folding_strategy_gives_the_same_bits_whatever_order_replies_come_in(
    name: str, tiny: Task
) -> None:
    orders: list[Order] = [list, lambda replies: replies[::-1], lambda r: r[3:] + r[:3]]
    results = {after_three_rounds(name, tiny, order).tobytes() for order in orders}
    assert len(results) == 1


@pytest.mark.parametrize("name", FOLDED)
def test_a_folding_strategy_gives_what_flowers_own_gives_of_all_replies(
    name: str, tiny: Task
) -> None:
    folded = after_three_rounds(name, tiny)
    stock = after_three_rounds(name, tiny, folds=False)
    assert np.abs(folded - stock).max() <= 2e-6 * np.abs(stock).max()


@pytest.mark.parametrize("name", FOLDED)
def test_whose_new_weights_are_the_mean_says_so(name: str, tiny: Task) -> None:
    assume_identity(1)
    chosen = make_strategy(name, OPTIONS.get(name, {}), cohort=6, size=1000)
    weights = pack(build_model(tiny, RunConfig(name="run", task="task.py")).model)
    mean = ExactMean(len(weights))
    for place in range(3):
        mean.add(weights + numpy_rng(0, place).normal(size=len(weights)).astype(np.float32), 7)
    record = weights_record(weights)
    (asked,) = chosen.strategy.configure_train(
        1, record, ConfigRecord({}), CohortGrid(InProcessGrid(1, [5], lambda m: m), [5])
    )
    arrays, _ = chosen.strategy.aggregate_train(1, [mean_as_reply(mean.mean(), mean.weight, asked)])
    assert arrays is not None
    same = np.array_equal(arrays[MODEL].numpy(), mean.mean())
    assert same or not chosen.means
    assert chosen.means == (name in ("FedAvg", "FedProx"))


@pytest.mark.parametrize("name", NETWORKS)
def test_what_says_that_it_folds_is_what_folds(name: str) -> None:
    chosen = make_strategy(name, OPTIONS.get(name, {}), cohort=6, size=1000)
    assert chosen.folds == (name in FOLDED)
    assert any("needs every update of a round at once" in note for note in chosen.notes) != (
        chosen.folds
    )


@pytest.mark.parametrize(
    ("name", "norm"),
    [
        ("DifferentialPrivacyClientSideFixedClipping", "clipping_norm"),
        ("DifferentialPrivacyServerSideFixedClipping", "clipping_norm"),
        ("DifferentialPrivacyClientSideAdaptiveClipping", "initial_clipping_norm"),
        ("DifferentialPrivacyServerSideAdaptiveClipping", "initial_clipping_norm"),
    ],
)
def test_the_dp_wrappers_really_clip(name: str, norm: str, federate: Federate, tiny: Task) -> None:
    start = pack(build_model(tiny, RunConfig(name="run", task="task.py", seed=1)).model)

    def moved(bound: float) -> float:
        options = {"noise_multiplier": 0.0, norm: bound}
        end = federate(strategy=name, strategy_options=options, rounds=1).federated.weights
        return float(np.linalg.norm(end - start))

    assert moved(1e-3) <= 1e-3 * (1 + 1e-4)
    assert moved(1e3) > 0.05


def test_a_wrapper_runs_the_strategy_that_it_is_given(federate: Federate) -> None:
    name = "DifferentialPrivacyServerSideFixedClipping"
    options = {"noise_multiplier": 0.0, "clipping_norm": 1e6}
    plain = federate(strategy="FedMedian").federated.weights
    wrapped = federate(strategy=name, strategy_options={**options, "strategy": "FedMedian"})
    assert np.allclose(wrapped.federated.weights, plain, atol=1e-6)
    mean = federate(strategy=name, strategy_options=options).federated.weights
    assert not np.allclose(mean, plain, atol=1e-6)
