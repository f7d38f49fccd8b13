"""How many clients are trained at once: as many as memory can hold, or a cache large layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from fedcore import Task
from fedcore.config.owner import OPEN_POLICY
from fedcore.config.run import RunConfig
from fedcore.seeds import Simulated, torch_rng
from fedcore.task.model import FullModel
from fedcore.training.client import Client
from fedcore.training.per_example import cpu
from fedcore.training.per_example.chain import Chain, Run
from fedcore.training.per_example.cpu import kernel_run
from fedcore.updates.pack import pack
from server.simulation.batched import trainer as together
from server.simulation.batched.trainer import Trainer, find_trainer, train_in_groups
from server.simulation.batched.work import LocalWork, TrainedClients


def small() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 10))


def large() -> nn.Module:
    """Its second convolution looks at 121 times 288 numbers in an image."""
    return nn.Sequential(
        *(nn.Conv2d(1, 32, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(32, 4, 3), nn.Flatten()),
        nn.Linear(484, 10),
    )


def nothing(*_: object, **__: object) -> None:
    """In place of what finds compiled loops."""


def data(client: str, folder: object) -> TensorDataset:
    rng = torch_rng(0, client)
    return TensorDataset(torch.randn(20, 1, 28, 28, generator=rng), torch.zeros(20).long())


def client_of(model: object, *, private: bool = False) -> Client:
    task = Task(
        name="groups",
        kind="classification",
        model=model,  # type: ignore[arg-type]
        clients=lambda folder: ["0"],
        client_data=data,  # type: ignore[arg-type]
        test_data=lambda folder: data("0", folder),  # type: ignore[arg-type,return-value]
        example_input=torch.zeros(1, 28, 28),
    )
    privacy = {"unit": "example", "target_delta": 1e-3, "noise_multiplier": 1.0, "max_epsilon": 9}
    values = {
        "name": "groups",
        "task": "task.py",
        "federation": {"rounds": 1},
        "client": {"batch_size": 10},
        "privacy": privacy if private else {},
    }
    return Client(task, RunConfig.model_validate(values), OPEN_POLICY, Simulated(1))


def sizes_of_groups(client: Client, count: int) -> list[int]:
    sample = LocalWork(data("0", None), lambda: torch_rng(0))  # type: ignore[arg-type]
    found = find_trainer(client, client.resident, sample, client.run.client)
    assert isinstance(found, Trainer)
    sizes: list[int] = []

    def train(
        model: FullModel, work: Sequence[LocalWork], settings: Any, mu: float
    ) -> TrainedClients:
        sizes.append(len(work))
        return TrainedClients(torch.zeros(len(work), 1), [0.0] * len(work))

    noting = Trainer(train, found.numbers, found.sequential)
    train_in_groups(noting, client.resident.model, [sample] * count, client, client.run.client, 0.0)
    return sizes


def test_clients_whose_batches_are_computed_in_parts_train_alone() -> None:
    client = client_of(small)
    sample = LocalWork(data("0", None), lambda: torch_rng(0))  # type: ignore[arg-type]
    parts = client.run.client.model_copy(update={"physical_batch_size": 4})
    found = find_trainer(client, client.resident, sample, parts)
    assert isinstance(found, str)
    assert found.startswith("client.physical_batch_size = 4 bounds memory")
    enough = parts.model_copy(update={"physical_batch_size": 10})
    assert isinstance(find_trainer(client, client.resident, sample, enough), Trainer)


def test_a_small_models_clients_go_all_at_once() -> None:
    assert sizes_of_groups(client_of(small), 40) == [40]


def test_of_a_large_one_so_many_as_a_cache_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    assert sizes_of_groups(client_of(large, private=True), 10) == [3, 3, 3, 1]
    monkeypatch.setattr(together, "compiled_run", nothing)
    assert sizes_of_groups(client_of(large), 10) == [3, 3, 3, 1]


def test_where_layers_take_clients_in_turn_groups_are_of_one_size() -> None:
    assert sizes_of_groups(client_of(large), 10) == [5, 5]
    assert sizes_of_groups(client_of(large), 25) == [7, 7, 7, 4]


@pytest.mark.parametrize("model", [small, large])
def test_privacy_is_trained_side_by_side_too(model: object) -> None:
    assert sum(sizes_of_groups(client_of(model, private=True), 5)) == 5


def test_a_linear_model_is_trained_the_same_without_its_compiled_loop(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    client = client_of(small)
    work = [LocalWork(data("0", None), lambda: torch_rng(0))] * 2  # type: ignore[arg-type]
    compiled = find_trainer(client, client.resident, work[0], client.run.client)
    monkeypatch.setattr(together, "_linear", nothing)
    plain = find_trainer(client, client.resident, work[0], client.run.client)
    assert isinstance(compiled, Trainer)
    assert isinstance(plain, Trainer)
    assert (compiled.numbers, plain.numbers) == (0, 784)  # another way, indeed
    start = pack(client.resident.model.model)
    given = (client.resident.model, work, client.run.client, 0.0)
    one, other = (each.train(*given) for each in (compiled, plain))
    gap = (one.weights - other.weights).norm(dim=1)
    assert (gap <= 1e-5 * (one.weights - torch.from_numpy(start)).norm(dim=1)).all()
    assert one.losses == pytest.approx(other.losses, rel=1e-5)


def test_convolutions_are_trained_the_same_without_their_kernels(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    client = client_of(large)
    work = [LocalWork(data(name, None), lambda: torch_rng(0)) for name in "01"]  # type: ignore[arg-type]
    asked: list[Chain] = []

    def noting(chain: Chain, *, per_example: bool) -> Run | None:
        asked.append(chain)
        return kernel_run(chain, per_example=per_example)

    monkeypatch.setattr(cpu, "kernel_run", noting)
    compiled = find_trainer(client, client.resident, work[0], client.run.client)
    assert len(asked) == 1
    monkeypatch.setattr(together, "compiled_run", nothing)
    plain = find_trainer(client, client.resident, work[0], client.run.client)
    assert len(asked) == 1
    assert isinstance(compiled, Trainer)
    assert isinstance(plain, Trainer)
    start = torch.from_numpy(pack(client.resident.model.model))
    given = (client.resident.model, work, client.run.client, 0.0)
    one, other = (each.train(*given) for each in (compiled, plain))
    gap = (one.weights - other.weights).norm(dim=1)
    assert (gap <= 1e-5 * (one.weights - start).norm(dim=1)).all()
    assert one.losses == pytest.approx(other.losses, rel=1e-5)
