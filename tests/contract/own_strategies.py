"""A small federation for strategies of a user's own, and its training written out in torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import TensorDataset

from fedcore.config.owner import OPEN_POLICY
from fedcore.config.run import RunConfig
from fedcore.seeds import Simulated, torch_rng
from fedcore.task.definition import Examples, Task
from fedcore.task.model import build_model
from fedcore.updates.pack import Vector, pack
from server.records import RoundRecord
from server.rounds.app import Listener, Outcome, server_app
from server.simulation.federate import federate
from server.simulation.virtual.devices import read_fleet
from server.simulation.virtual.nodes import FIRST_NODE_ID
from server.simulation.virtual.state import Choice, SimulationState

EXAMPLES = Path(__file__).parents[2] / "examples" / "algorithms"
NAMES = [f"client-{place}" for place in range(4)]
CLIENT = {"batch_size": 64, "epochs": 3, "learning_rate": 0.2}
"""A batch holds all of a client, so that the order of examples makes no difference."""
PRIVATE = {"unit": "example", "target_delta": 1e-3, "noise_multiplier": 0.8, "max_epsilon": 1e4}


def client_data(name: str) -> Examples:
    rng = torch_rng(0, name)
    targets = torch.randint(3, (10 + sum(map(ord, name)) % 7,), generator=rng)
    noise = torch.randn(len(targets), 5, generator=rng)
    inputs = nn.functional.one_hot(targets, 5) + 0.3 * noise
    return TensorDataset(inputs, targets)  # type: ignore[return-value]


TASK = Task(
    name="tiny",
    kind="classification",
    model=lambda: nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3)),
    clients=lambda folder: NAMES,
    client_data=lambda name, folder: client_data(name),
    test_data=lambda folder: client_data("test"),
    example_input=torch.zeros(5),
)


def run_of(
    strategy: str = "FedAvg",
    *,
    base: Path = EXAMPLES,
    training: str = "loop",
    client: Any = None,
    privacy: Any = None,
    **federation: Any,
) -> RunConfig:
    return RunConfig.model_validate(
        {
            "name": "tiny",
            "task": "task.py",
            "base": base,
            "seed": 5,
            "federation": {"rounds": 4, "strategy": strategy, **federation},
            "client": CLIENT | (client or {}),
            "privacy": privacy or {},
            "simulation": {"training": training, "workers": 1},
        }
    )


@dataclass
class Told:
    outcome: Outcome
    records: list[RoundRecord]
    notes: list[str]
    choices: list[Choice]

    @property
    def weights(self) -> Vector:
        return self.outcome.federated.weights


def train(run: RunConfig, given: Any = None, task: Task = TASK) -> Told:
    outcomes: list[Outcome] = []
    told = Told(None, [], [], [])  # type: ignore[arg-type]
    state = SimulationState()
    server = server_app(
        task,
        run,
        cloud=None,
        randomness=Simulated(run.seed),
        listener=Listener(told.notes.append, told.records.append, outcomes.append),
        strategy=given,
        client_name=lambda node: NAMES[node - FIRST_NODE_ID],
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
        on_choice=lambda choice, workers: told.choices.append(choice),
    )
    told.outcome = outcomes[0]
    return told


def start_of(run: RunConfig, task: Task = TASK) -> Vector:
    return pack(build_model(task, run).model)


def locally(
    weights: Vector, name: str, *, rate: float = 0.2, epochs: int = 3, mu: float = 0.0
) -> Vector:
    """Full-batch gradient descent of one client, written out."""
    inputs, targets = client_data(name).tensors  # type: ignore[attr-defined]
    model = TASK.model()
    nn.utils.vector_to_parameters(torch.from_numpy(weights.copy()), model.parameters())
    start = [one.detach().clone() for one in model.parameters()]
    for _ in range(epochs):
        model.zero_grad()
        loss = nn.functional.cross_entropy(model(inputs), targets)
        for one, before in zip(model.parameters(), start, strict=True):
            loss = loss + mu / 2 * (one - before).square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        with torch.no_grad():
            for one in model.parameters():
                assert one.grad is not None
                one -= rate * one.grad
    return nn.utils.parameters_to_vector(model.parameters()).detach().numpy()


def averaged(weights: Vector, train_one: Callable[[Vector, str], Vector]) -> Vector:
    """The mean over all clients, weighted by their examples, in float64."""
    sizes = [len(client_data(name)) for name in NAMES]  # type: ignore[arg-type]
    rows = np.stack([train_one(weights, name).astype(np.float64) for name in NAMES])
    return np.average(rows, axis=0, weights=sizes).astype(np.float32)
