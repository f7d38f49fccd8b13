from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import Subset, TensorDataset

from fedcore.config.run import RunConfig
from fedcore.privacy.accounting import Charge
from fedcore.privacy.ledger import Ledger
from fedcore.task.definition import Task
from fedcore.task.model import FullModel
from server.simulation import clients
from server.simulation.clients import client_records
from server.simulation.virtual.state import SimulationState


class First(nn.Module):
    """Its outputs are its inputs: class 0 where the first is the larger."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


MODEL = FullModel(nn.Identity(), First())


def data(right: int, wrong: int) -> Any:
    inputs = torch.tensor([[1.0, 0.0]] * right + [[0.0, 1.0]] * wrong)
    return TensorDataset(inputs, torch.zeros(right + wrong, dtype=torch.long))


PARTS = {"ben": data(1, 3), "anna": data(2, 0), "empty": Subset(data(1, 0), [])}


def task_of(parts: dict[str, Any]) -> Task:
    return Task(
        name="tiny",
        kind="classification",
        model=lambda: nn.Linear(2, 2),
        clients=lambda folder: list(parts),
        client_data=lambda client, folder: parts[client],
        test_data=lambda folder: parts["anna"],
        example_input=torch.zeros(2),
    )


def make_run(**privacy: Any) -> RunConfig:
    return RunConfig.model_validate({"name": "run", "task": "x", "privacy": privacy})


def test_each_client_is_judged_on_its_own_data_in_the_order_of_names() -> None:
    state = SimulationState(rounds=Counter({"ben": 3, "anna": 1}))
    records = client_records(make_run(), task_of(PARTS), MODEL, state, None)
    assert [(r.client, r.examples, r.metric, r.rounds) for r in records] == [
        ("anna", 2, 1.0, 1),
        ("ben", 4, 0.25, 3),
    ]
    assert all(record.epsilon is None for record in records)


def test_under_privacy_each_ones_own_epsilon_is_told() -> None:
    spent = Charge(1, 1.0, 0.5, 4)
    ledgers = {"ben": Ledger((spent, spent)), "anna": Ledger((spent,))}
    state = SimulationState(ledgers, Counter({"ben": 2, "anna": 1}))
    run = make_run(unit="example", target_delta=1e-3)
    anna, ben = client_records(run, task_of(PARTS), MODEL, state, None)
    assert anna.epsilon == Ledger((spent,)).epsilon(run.privacy)
    assert ben.epsilon == Ledger((spent, spent)).epsilon(run.privacy)


def test_a_client_without_data_has_no_record() -> None:
    state = SimulationState(rounds=Counter({"empty": 1, "anna": 1}))
    records = client_records(make_run(), task_of(PARTS), MODEL, state, None)
    assert [record.client for record in records] == ["anna"]


def test_a_client_whose_examples_the_model_does_not_take_has_no_record() -> None:
    model = FullModel(nn.Identity(), nn.Linear(2, 2))
    odd = TensorDataset(torch.zeros(2, 7), torch.zeros(2, dtype=torch.long))
    state = SimulationState(rounds=Counter({"odd": 1, "anna": 1}))
    records = client_records(make_run(), task_of({**PARTS, "odd": odd}), model, state, None)
    assert [record.client for record in records] == ["anna"]


def test_no_more_than_a_thousand_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    assert clients.MAX_CLIENTS == 1000
    monkeypatch.setattr(clients, "MAX_CLIENTS", 3)
    names = [f"client-{number}" for number in range(5)]
    state = SimulationState(rounds=Counter(names))
    parts = dict.fromkeys([*names, "anna"], PARTS["anna"])
    records = client_records(make_run(), task_of(parts), MODEL, state, None)
    assert [record.client for record in records] == names[:3]
