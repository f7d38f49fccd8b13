"""A federation of six small clients that trains in a fraction of a second."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from fedcore.client_app import client_app
from fedcore.config.owner import OPEN_POLICY
from fedcore.config.run import RunConfig
from fedcore.seeds import Simulated, torch_rng
from fedcore.task.definition import Task
from fedcore.training.mods import client_mods
from server.rounds.app import Listener, Outcome, server_app
from server.simulation.engine import simulate

CLIENTS = [f"client-{number}" for number in range(6)]
Federate = Callable[..., Outcome]


def _data(client: str) -> Any:
    rng = torch_rng(0, client)
    targets = torch.randint(3, (20,), generator=rng)
    inputs = nn.functional.one_hot(targets, 5) + 0.3 * torch.randn(20, 5, generator=rng)
    return TensorDataset(inputs, targets)


TASK = Task(
    name="tiny",
    kind="classification",
    model=lambda: nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3)),
    clients=lambda folder: CLIENTS,
    client_data=lambda client, folder: _data(client),
    test_data=lambda folder: _data("test"),
    example_input=torch.zeros(5),
)


def _federate(
    *, clients: list[str] = CLIENTS, task: Task = TASK, seed: int = 1, **federation: Any
) -> Outcome:
    run = RunConfig.model_validate(
        {
            "name": "run",
            "task": "task.py",
            "seed": seed,
            "federation": {"rounds": 2} | federation,
            "client": {"batch_size": 8},
        }
    )
    outcomes: list[Outcome] = []
    randomness = Simulated(seed)
    listener = Listener(lambda note: None, lambda record: None, outcomes.append)
    server = server_app(task, run, cloud=None, randomness=randomness, listener=listener)
    mods = client_mods(run.federation.strategy)
    client = client_app(task, run, owner=OPEN_POLICY, randomness=randomness, mods=mods)
    simulate(server, client, clients)
    return outcomes[0]


@pytest.fixture(scope="session")
def federate() -> Federate:
    """Runs two rounds and gives their outcome."""
    return _federate


@pytest.fixture(scope="session")
def tiny() -> Task:
    return TASK
