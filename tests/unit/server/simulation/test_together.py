"""A simulation gives the same model whichever engine trains its clients."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from fedcore import Task
from fedcore.client_app import Client, client_app
from fedcore.config import RunConfig
from fedcore.errors import ConfigError, DataError
from fedcore.owner import OPEN_POLICY
from fedcore.seeds import Simulated, torch_rng
from fedcore.task import Examples, Folder
from server.app import Listener, Outcome, server_app
from server.records import RoundRecord
from server.simulation.engine import simulate
from server.simulation.together import vectorised_clients

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


def run_of(engine: str, **federation: object) -> RunConfig:
    return RunConfig.model_validate(
        {
            "name": "tiny",
            "task": "task.py",
            "federation": {"rounds": 4, "quorum": 0.5, **federation},
            "client": {"epochs": 2, "batch_size": 4},
            "simulation": {"engine": engine},
        }
    )


def train(run: RunConfig) -> tuple[Outcome, list[RoundRecord], list[str]]:
    randomness = Simulated(3)
    notes: list[str] = []
    records: list[RoundRecord] = []
    outcomes: list[Outcome] = []
    listener = Listener(on_note=notes.append, on_round=records.append, on_end=outcomes.append)
    server = server_app(TASK, run, cloud=None, randomness=randomness, listener=listener)
    client = client_app(TASK, run, owner=OPEN_POLICY, randomness=randomness)
    together = None
    if run.simulation.engine == "vectorised":
        together = vectorised_clients(Client(TASK, run, OPEN_POLICY, randomness))
    simulate(server, client, NAMES, together=together)
    return outcomes[0], records, notes


@pytest.mark.parametrize("strategy", ["FedAvg", "FedMedian", "FedProx"])
def test_both_engines_give_the_same_model_and_the_same_failures(strategy: str) -> None:
    options = {"proximal_mu": 0.1} if strategy == "FedProx" else {}
    asked = {"strategy": strategy, "strategy_options": options}
    one, loop, said = train(run_of("loop", **asked))
    other, vectorised, also_said = train(run_of("vectorised", **asked))
    weights = one.federated.weights
    distance = np.linalg.norm(weights - other.federated.weights) / np.linalg.norm(weights)
    assert distance <= 1e-5
    assert [r.updates for r in loop] == [r.updates for r in vectorised] == [4] * 4
    assert [r.bytes_up for r in loop] == [r.bytes_up for r in vectorised]
    for notes in (said, also_said):
        assert any("client-3" in note and DataError.__name__ in note for note in notes)
    losses = [record.train_loss for record in loop]
    assert [record.train_loss for record in vectorised] == pytest.approx(losses, rel=1e-5)


def test_the_same_seed_gives_the_same_bits() -> None:
    one, _, _ = train(run_of("vectorised"))
    other, _, _ = train(run_of("vectorised"))
    assert one.federated.weights.tobytes() == other.federated.weights.tobytes()


def test_a_strategy_whose_clients_run_a_mod_is_refused() -> None:
    name = "DifferentialPrivacyClientSideFixedClipping"
    client = Client(TASK, run_of("vectorised", strategy=name), OPEN_POLICY, Simulated(0))
    with pytest.raises(ConfigError, match="mod"):
        vectorised_clients(client)
