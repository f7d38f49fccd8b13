"""The algorithms of examples/algorithms are those of their papers, by a plain loop of torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fedcore
from fedcore import Algorithm, ClientSettings, ClientUpdate, Round
from fedcore.config.simulated import DeviceClass
from fedcore.updates.pack import Vector
from server.rounds.strategies.checked import CheckedAlgorithm
from tests.contract.own_strategies import (
    EXAMPLES,
    NAMES,
    TASK,
    averaged,
    client_data,
    locally,
    run_of,
    start_of,
    train,
)

WAYS = ["loop", "vectorised"]
ROUNDS = 4


def same(one: Vector, other: Vector) -> bool:
    return bool(np.abs(one - other).max() <= 1e-5 * np.abs(other).max())


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_an_example_is_one_short_file(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 60
    assert "Source:" in path.read_text()


@pytest.mark.parametrize("training", WAYS)
def test_federated_averaging(training: str) -> None:
    run = run_of("fedavg.py:FederatedAveraging", training=training)
    weights = start_of(run)
    for _ in range(ROUNDS):
        weights = averaged(weights, locally)
    found = train(run)
    assert same(found.weights, weights)
    assert [choice.method for choice in found.choices] == [training]
    assert train(run_of("FedAvg", training=training)).weights.tobytes() == found.weights.tobytes()


@pytest.mark.parametrize("training", WAYS)
def test_fedprox(training: str) -> None:
    run = run_of("fedprox.py:Proximal", training=training, strategy_options={"mu": 0.7})
    weights = start_of(run)
    for _ in range(ROUNDS):
        weights = averaged(weights, lambda start, name: locally(start, name, mu=0.7))
    found = train(run)
    assert same(found.weights, weights)
    flowers = run_of("FedProx", training=training, strategy_options={"proximal_mu": 0.7})
    assert train(flowers).weights.tobytes() == found.weights.tobytes()


@pytest.mark.parametrize("training", WAYS)
def test_slow_momentum_with_a_cosine_schedule(training: str) -> None:
    options = {"beta": 0.6, "alpha": 0.9, "last_share": 0.25}
    run = run_of("slow_momentum.py:SlowMomentum", training=training, strategy_options=options)
    weights = start_of(run)
    momentum = np.zeros_like(weights)
    for number in range(ROUNDS):
        rate = 0.05 + (0.2 - 0.05) / 2 * (1 + math.cos(math.pi * number / (ROUNDS - 1)))
        mean = averaged(weights, lambda start, name, rate=rate: locally(start, name, rate=rate))
        momentum = 0.6 * momentum + (weights - mean) / rate
        weights = weights - 0.9 * rate * momentum
    assert same(train(run).weights, weights)


@dataclass(frozen=True)
class OfEachClient(Algorithm):
    """Other settings for each client; each update counts for the same."""

    folds = False

    def configure(
        self, round: Round, clients: Sequence[str], state: Mapping[str, Any]
    ) -> dict[str, ClientSettings]:
        own = {"client-0": ClientSettings(epochs=5), "nobody": ClientSettings(epochs=1)}
        rate = 0.3 / round.number
        return {
            name: own.get(name) or ClientSettings(learning_rate=rate)
            for name in [*clients, "nobody"]
            if name != "client-3"
        }

    def aggregate(
        self,
        round: Round,
        weights: Vector,
        updates: Sequence[ClientUpdate],
        state: Mapping[str, Any],
    ) -> tuple[Vector, dict[str, Any]]:
        assert [one.client for one in updates] == NAMES
        assert all("train_loss" in one.metrics for one in updates)
        return np.mean([one.weights for one in updates], axis=0), {"seen": len(updates)}


class Folding(OfEachClient):
    folds = True

    def step(
        self, round: Round, weights: Vector, mean: Vector, state: Mapping[str, Any]
    ) -> tuple[Vector, Mapping[str, Any]]:
        return mean, state


@pytest.mark.parametrize("algorithm", [OfEachClient(), Folding()], ids=["each", "mean"])
@pytest.mark.parametrize("training", WAYS)
def test_each_client_trains_with_its_own_settings(training: str, algorithm: Algorithm) -> None:
    run = run_of("test:own", training=training, weighting="uniform", rounds=2)

    def one(start: Vector, name: str, number: int) -> Vector:
        if name == "client-0":
            return locally(start, name, epochs=5)
        return locally(start, name, rate=0.2 if name == "client-3" else 0.3 / number)

    weights = start_of(run)
    for number in (1, 2):
        weights = np.mean([one(weights, name, number) for name in NAMES], axis=0)
    found = train(run, algorithm)
    assert same(found.weights, weights)
    assert [choice.method for choice in found.choices] == [training]
    assert [record.updates for record in found.records] == [4, 4]


def test_momentum_may_come_and_go_beside_compiled_loops() -> None:
    """A linear classifier is trained by a loop that knows no momentum."""

    class Comes(Algorithm):
        def configure(self, round: Round, clients: Any, state: Any) -> ClientSettings:
            return ClientSettings(momentum=0.5 * (round.number % 2), weight_decay=0.01)

        def step(self, round: Round, weights: Any, mean: Any, state: Any) -> Any:
            return mean, state

    from dataclasses import replace

    from torch import nn

    linear = replace(TASK, model=lambda: nn.Linear(5, 3))
    one, other = (train(run_of("t:c", training=way), Comes(), linear) for way in WAYS)
    assert same(one.weights, other.weights)


def test_a_round_knows_where_it_stands() -> None:
    checked = CheckedAlgorithm(Folding(), run_of(rounds=5))
    first, last = checked.round(1), checked.round(5)
    assert (first.progress, last.progress) == (0.0, 1.0)
    assert first.client.learning_rate == 0.2
    assert first.seed != last.seed
    assert checked.round(1) == first


def test_an_instance_a_class_and_a_name_are_taken_from_python() -> None:
    quick: dict[str, Any] = {
        "compression": {"candidates": ("fp32",), "timing_runs": 100},
        "progress": False,
    }
    by_file = run_of("fedprox.py:Proximal", strategy_options={"mu": 0.7}, rounds=2)
    expected = train(by_file).weights.tobytes()
    found = fedcore.simulate(TASK, by_file, **quick)
    assert found.record.rounds[-1].updates == 4

    class Mine(Algorithm):
        def __init__(self, mu: float) -> None:
            self.mu = mu

        def configure(self, round: Any, clients: Any, state: Any) -> ClientSettings:
            return ClientSettings(proximal_mu=self.mu)

        def step(self, round: Any, weights: Any, mean: Any, state: Any) -> Any:
            return mean, state

    from fedcore.updates.pack import pack

    for given in (Mine(0.7), Mine, "FedProx"):
        run = by_file
        if given == "FedProx":
            run = run_of(strategy_options={"proximal_mu": 0.7}, rounds=2)
        result = fedcore.simulate(TASK, run, strategy=given, **quick)  # type: ignore[arg-type]
        assert pack(result.model.model).tobytes() == expected


def test_settings_reach_workers_in_processes_of_their_own() -> None:
    run = run_of("test:own", weighting="uniform", rounds=2)
    simulation = run.simulation.model_copy(update={"workers": 2})
    apart = run.model_copy(update={"simulation": simulation})
    for algorithm in (OfEachClient(), Folding()):
        one, other = train(run, algorithm), train(apart, algorithm)
        assert one.weights.tobytes() == other.weights.tobytes()


def test_on_the_virtual_clock_a_client_takes_as_long_as_its_own_epochs() -> None:
    run = run_of("test:own", rounds=1)
    device = {"name": "phone", "examples_per_s": 10.0}
    simulation = run.simulation.model_copy(update={"devices": (DeviceClass(**device),)})
    found = train(run.model_copy(update={"simulation": simulation}), Folding())
    sizes = {name: len(client_data(name)) for name in NAMES}  # type: ignore[arg-type]
    seconds = max(sizes[name] * (5 if name == "client-0" else 3) / 10.0 for name in NAMES)
    assert found.records[0].virtual is not None
    assert found.records[0].virtual.simulated_s == pytest.approx(seconds, abs=0.01)
