"""A simulation gives the same model however, and by how many, its clients are trained."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from fedcore import Task
from fedcore.config.owner import OPEN_POLICY
from fedcore.config.run import RunConfig
from fedcore.errors import ConfigError, DataError, RoundFailed
from fedcore.seeds import Simulated, torch_rng
from fedcore.task.definition import Examples, Folder
from fedcore.updates.pack import Vector
from server.records import RoundRecord
from server.rounds.app import Listener, Outcome, server_app
from server.rounds.cohort import select
from server.simulation.federate import federate
from server.simulation.virtual.devices import read_fleet
from server.simulation.virtual.state import Choice, SimulationState
from server.simulation.workers import scheduler

NAMES = [f"client-{place}" for place in range(6)]


def client_data(name: str, folder: Folder) -> Examples:
    if name == "client-3":
        raise OSError("its disk is gone")
    count = 8 + len(name) + int(name[-1])
    inputs = torch.randn(count, 4, generator=torch_rng(0, name))
    if name == "client-5":
        inputs[0] = float("nan")
    return TensorDataset(inputs, inputs.argmax(1))  # type: ignore[return-value]


TASK = Task(
    name="tiny",
    kind="classification",
    model=lambda: nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)),
    clients=lambda folder: NAMES,
    client_data=client_data,
    test_data=lambda folder: client_data("client-0", folder),
    example_input=torch.zeros(4),
)


CONV = replace(
    TASK,
    model=lambda: nn.Sequential(
        nn.Unflatten(1, (1, 2, 2)), nn.Conv2d(1, 3, 2), nn.Flatten(), nn.Linear(3, 4)
    ),
)
PRIVATE = {"unit": "example", "target_delta": 1e-3, "noise_multiplier": 0.8, "max_epsilon": 1e4}


def run_of(simulation: dict[str, Any], privacy: Any = None, **federation: object) -> RunConfig:
    return RunConfig.model_validate(
        {
            "name": "tiny",
            "task": "task.py",
            "federation": {"rounds": 4, "quorum": 0.5, **federation},
            "client": {"epochs": 2, "batch_size": 4},
            "privacy": privacy or {},
            "simulation": simulation,
        }
    )


@dataclass
class Told:
    outcome: Outcome
    records: list[RoundRecord]
    notes: list[str]
    choices: list[tuple[Choice, int]]
    state: SimulationState

    @property
    def weights(self) -> Vector:
        return self.outcome.federated.weights


def train(run: RunConfig, task: Task = TASK) -> Told:
    outcomes: list[Outcome] = []
    records: list[RoundRecord] = []
    notes: list[str] = []
    choices: list[tuple[Choice, int]] = []
    listener = Listener(on_note=notes.append, on_round=records.append, on_end=outcomes.append)
    state = SimulationState()
    server = server_app(
        task,
        run,
        cloud=None,
        randomness=Simulated(run.seed),
        listener=listener,
        annotate=state.with_clock,
    )
    federate(
        server,
        task,
        run,
        OPEN_POLICY,
        NAMES,
        state=state,
        fleet=read_fleet(run, NAMES),
        on_choice=lambda choice, workers: choices.append((choice, workers)),
    )
    return Told(outcomes[0], records, notes, choices, state)


def distance(one: Vector, other: Vector) -> float:
    return float(np.linalg.norm(one - other) / np.linalg.norm(one))


LOOP: dict[str, Any] = {"training": "loop", "workers": 1}
SIDE_BY_SIDE: dict[str, Any] = {"training": "vectorised", "workers": 1}


@pytest.mark.parametrize("strategy", ["FedAvg", "FedMedian", "FedProx"])
@pytest.mark.parametrize("privacy", [None, PRIVATE], ids=["plain", "private"])
def test_both_ways_give_the_same_model_and_the_same_failures(
    strategy: str, privacy: dict[str, Any] | None
) -> None:
    options = {"proximal_mu": 0.1} if strategy == "FedProx" else {}
    asked = {"strategy": strategy, "strategy_options": options}
    loop = train(run_of(LOOP, privacy, **asked))
    side = train(run_of(SIDE_BY_SIDE, privacy, **asked))
    assert distance(loop.weights, side.weights) <= 1e-5
    expected = [5 if privacy else 4] * 4  # under privacy an example of NaN counts as zero
    assert [r.updates for r in loop.records] == [r.updates for r in side.records] == expected
    assert [r.bytes_up for r in loop.records] == [r.bytes_up for r in side.records]
    assert [r.epsilon_max for r in loop.records] == [r.epsilon_max for r in side.records]
    assert loop.state == replace(side.state, choice=loop.state.choice)
    for told in (loop, side):
        assert any("client-3" in note and DataError.__name__ in note for note in told.notes)
    losses = [record.train_loss for record in loop.records]
    if privacy:
        assert losses == [record.train_loss for record in side.records] == [None] * 4
        return
    assert [record.train_loss for record in side.records] == pytest.approx(losses, rel=1e-5)


@pytest.mark.parametrize("way", [LOOP, SIDE_BY_SIDE], ids=["loop", "vectorised"])
@pytest.mark.parametrize("strategy", ["FedAvg", "FedMedian"])
@pytest.mark.parametrize("privacy", [None, PRIVATE], ids=["plain", "private"])
def test_two_processes_give_the_bits_of_one(
    way: dict[str, Any], strategy: str, privacy: dict[str, Any] | None
) -> None:
    one = train(run_of(way, privacy, strategy=strategy))
    two = train(run_of(way | {"workers": 2}, privacy, strategy=strategy))
    assert [workers for _, workers in one.choices + two.choices] == [1, 2]
    if way is LOOP:
        assert one.weights.tobytes() == two.weights.tobytes()
    else:  # who trains beside whom decides how products are blocked
        assert distance(one.weights, two.weights) <= 1e-5
    assert one.state == two.state
    assert [r.updates for r in one.records] == [r.updates for r in two.records]
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("strategy", ["FedAvg", "FedMedian"])
def test_examples_that_count_as_zero_are_told_once_with_their_client(
    workers: int, strategy: str, caplog: pytest.LogCaptureFixture
) -> None:
    train(run_of({"training": "auto", "workers": workers}, PRIVATE, strategy=strategy))
    told = [one.getMessage() for one in caplog.records if "counted as zero" in one.getMessage()]
    assert len(told) == 1
    assert told[0].startswith("client 'client-5': ")
    assert "example" in told[0]


def test_the_same_seed_gives_the_same_bits() -> None:
    one, other = train(run_of(SIDE_BY_SIDE)), train(run_of(SIDE_BY_SIDE))
    assert one.weights.tobytes() == other.weights.tobytes()


def test_convolutions_can_be_trained_side_by_side_without_privacy() -> None:
    loop, side = train(run_of(LOOP), CONV), train(run_of(SIDE_BY_SIDE), CONV)
    assert distance(loop.weights, side.weights) <= 1e-5
    with pytest.raises(ConfigError, match="one client at a time"):
        train(run_of(SIDE_BY_SIDE, PRIVATE), CONV)


@pytest.mark.parametrize(
    ("task", "options", "why"),
    [
        (TASK, {"strategy": "DifferentialPrivacyClientSideFixedClipping",
                "strategy_options": {"noise_multiplier": 0.1, "clipping_norm": 1.0}}, "mod"),
        (replace(TASK, model=lambda: nn.Sequential(nn.Linear(4, 4), nn.RReLU())), {}, "RReLU"),
    ],
)  # fmt: skip
def test_what_cannot_go_side_by_side_is_refused_or_goes_one_by_one(
    task: Task, options: dict[str, Any], why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match=why):
        train(run_of(SIDE_BY_SIDE, **options), task)
    monkeypatch.setattr(scheduler, "trial_budget_s", lambda *_, **__: 60.0)  # a long run's
    ((choice, _),) = train(run_of({"workers": 1}, **options), task).choices
    assert choice.method == "loop"
    assert why in choice.reason


def test_a_dead_worker_ends_the_run_and_is_named() -> None:
    def die(name: str, folder: Folder) -> Examples:
        if name == "client-2":
            os.kill(os.getpid(), signal.SIGKILL)
        return client_data(name, folder)

    with pytest.raises(RoundFailed, match=r"SIGKILL.*client-2") as caught:
        train(run_of(LOOP | {"workers": 2}), replace(TASK, client_data=die))
    assert "--resume" in str(caught.value)
    assert multiprocessing.active_children() == []


def test_devices_that_are_away_or_late_send_nothing_and_time_goes_by() -> None:
    classes = (
        {"name": "quick", "examples_per_s": 100.0},
        {"name": "slow", "examples_per_s": 0.1, "share": 2.0},
    )
    simulation = {"devices": classes, "workers": 1, "training": "loop"}
    told = train(run_of(simulation, PRIVATE, deadline_s=60.0, quorum=0.1))
    virtual = [record.virtual for record in told.records]
    assert all(one is not None and one.stragglers for one in virtual)
    assert told.state.clock_s == pytest.approx(sum(one.simulated_s for one in virtual if one))
    late = sum(one.stragglers for one in virtual if one)
    assert sum(record.updates for record in told.records) <= 4 * 5 - late
    # who was late had begun: under privacy it has spent what the others have
    spent = {name: len(ledger.charges) for name, ledger in told.state.ledgers.items()}
    assert set(spent.values()) == {4}
    assert (
        told.weights.tobytes()
        == train(
            run_of(simulation | {"workers": 2}, PRIVATE, deadline_s=60.0, quorum=0.1)
        ).weights.tobytes()
    )


@pytest.mark.parametrize("strategy", ["FedAvg", "FedMedian"])
def test_over_selection_takes_the_first_and_charges_the_late(strategy: str) -> None:
    simulation = LOOP | {"devices": ({"name": "phone", "examples_per_s": 1.0},)}
    run = run_of(simulation, PRIVATE, strategy=strategy, cohort=2, over_selection=2.0, rounds=6)
    told = train(run)
    asked: Counter[str] = Counter()
    for number, record in enumerate(told.records, start=1):
        nodes = select(range(1, 7), 4, seed=0, words=("round", number))
        names = [NAMES[node - 1] for node in nodes]
        asked.update(names)
        assert (record.cohort, record.updates) == (4, 2)
        assert record.virtual is not None
        well = [int(name[-1]) for name in names if name not in ("client-3", "client-5")]
        # Two epochs at an example a second; the quickest are those with the fewest examples.
        assert record.virtual.simulated_s == pytest.approx(2 * (16 + well[1]), abs=0.1)
    spent = {name: len(ledger.charges) for name, ledger in told.state.ledgers.items()}
    assert spent == {name: count for name, count in asked.items() if name != "client-3"}
    again = train(
        run.model_copy(update={"simulation": run.simulation.model_copy(update={"workers": 2})})
    )
    assert told.weights.tobytes() == again.weights.tobytes()


def test_without_devices_nobody_is_late_and_nobody_asked_in_addition() -> None:
    plain = train(run_of(LOOP, cohort=2))
    over = train(run_of(LOOP, cohort=2, over_selection=2.0))
    assert [record.cohort for record in over.records] == [2] * 4
    assert plain.weights.tobytes() == over.weights.tobytes()


class Detached(nn.Module):
    """Its first layer is not trained, which no look at its layers shows."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            hidden = torch.relu(self.first(x))
        return self.head(hidden)  # type: ignore[no-any-return]


class Centred(nn.Module):
    """Examples of a batch are mixed."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        outputs = self.layer(x)
        return outputs - outputs.mean(0)  # type: ignore[no-any-return]


class Tied(nn.Module):
    """One weight under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)
        self.two.weight = self.one.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.two(torch.tanh(self.one(x)))  # type: ignore[no-any-return]


def normed() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, track_running_stats=False))


WEIGHTED = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 5.0, 20.0, 1.0]))


@pytest.mark.parametrize(
    "task",
    [
        replace(TASK, model=lambda: nn.Sequential(nn.Linear(4, 4), nn.Dropout())),
        replace(TASK, loss=WEIGHTED),
        replace(TASK, loss=lambda o, t: nn.functional.cross_entropy(o, t, reduction="sum")),
    ],
    ids=["dropout", "weighted loss", "sum"],
)
def test_these_learn_the_same_side_by_side(task: Task) -> None:
    loop, side = train(run_of(LOOP), task), train(run_of(SIDE_BY_SIDE), task)
    assert distance(loop.weights, side.weights) <= 1e-5


@pytest.mark.parametrize(
    "task",
    [
        replace(TASK, model=Detached),
        replace(TASK, model=Centred),
        replace(TASK, model=Tied),
        replace(TASK, model=normed),
        replace(TASK, preprocess=nn.Dropout),
    ],
    ids=["no_grad", "mixing", "tied", "batch norm", "dropout before"],
)  # fmt: skip
def test_what_would_learn_something_else_side_by_side_goes_one_by_one(task: Task) -> None:
    told = train(run_of({"workers": 1}), task)
    assert told.choices[0][0].method == "loop"
    assert told.weights.tobytes() == train(run_of(LOOP), task).weights.tobytes()
    with pytest.raises(ConfigError, match=r"gets a different update|the model contains|mixes"):
        train(run_of(SIDE_BY_SIDE), task)


@pytest.mark.parametrize("bad", ["width", "label", "nan"])
@pytest.mark.parametrize("place", [0, 2])
@pytest.mark.parametrize("privacy", [None, PRIVATE], ids=["plain", "private"])
def test_one_clients_bad_data_is_its_own_failure(
    bad: str, place: int, privacy: dict[str, Any] | None
) -> None:
    def data(name: str, folder: Folder) -> Examples:
        if name != f"client-{place}":
            return client_data(name, folder)
        inputs = torch.randn(12, 5 if bad == "width" else 4)
        targets = torch.full((12,), 9 if bad == "label" else 1)
        return TensorDataset(inputs * (torch.nan if bad == "nan" else 1), targets)  # type: ignore[return-value]

    task = replace(TASK, client_data=data)
    found = {}
    for name, simulation in (
        ("loop", LOOP),
        ("side", SIDE_BY_SIDE),
        ("two", LOOP | {"workers": 2}),
    ):
        told = train(run_of(simulation, privacy), task)
        # Under privacy who answers must not show what the data is: such examples count as zero.
        assert [record.updates for record in told.records] == [5 if privacy else 3] * 4
        found[name] = told.weights
    assert found["loop"].tobytes() == found["two"].tobytes()
    assert distance(found["loop"], found["side"]) <= 1e-5
