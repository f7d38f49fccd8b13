"""What differs only on later clients, in odd settings or with odd data: learnt as if alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, RecordDict
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset, TensorDataset

from fedcore import Task
from fedcore.client_app import client_app
from fedcore.config.owner import OPEN_POLICY
from fedcore.config.run import RunConfig
from fedcore.errors import ConfigError
from fedcore.flower.identity import assume_identity
from fedcore.seeds import Simulated, torch_rng
from fedcore.task.definition import Examples, Folder
from fedcore.training.client import Client
from fedcore.updates.messages import ARRAYS, MODEL, array_of, instruction_config, weights_record
from fedcore.updates.pack import Vector, pack
from server.simulation.virtual.devices import read_fleet
from server.simulation.virtual.nodes import RUN_ID
from server.simulation.virtual.state import Method, SimulationState
from server.simulation.virtual.trace import COLUMNS
from server.simulation.workers.messages import ClientOutcome, ClientRef, RoundTask
from server.simulation.workers.scheduler import WorkerScheduler
from server.simulation.workers.worker import Worker

NAMES = [f"c{place}" for place in range(8)]
LATER = "c6"
"""A client that no look at the first four sees."""


def data(name: str, folder: Folder, count: int = 12) -> Examples:
    inputs = torch.randn(count, 4, generator=torch_rng(0, name))
    return TensorDataset(inputs, inputs.argmax(1))  # type: ignore[return-value]


def dense() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))


TASK = Task(
    name="odd",
    kind="classification",
    model=dense,
    clients=lambda folder: NAMES,
    client_data=data,
    test_data=lambda folder: data("test", folder),
    example_input=torch.zeros(4),
)
PRIVATE = {"unit": "example", "target_delta": 1e-3, "noise_multiplier": 0.8, "max_epsilon": 1e4}


class Bench:
    """A worker, its first order, and what clients answer to it."""

    def __init__(
        self,
        task: Task,
        *,
        client: dict[str, Any] | None = None,
        privacy: dict[str, Any] | None = None,
        simulation: dict[str, Any] | None = None,
        mu: float = 0.0,
    ) -> None:
        values = {
            "name": "odd",
            "task": "task.py",
            "federation": {"rounds": 3},
            "client": {"batch_size": 5, "learning_rate": 0.1, **(client or {})},
            "privacy": privacy or {},
            "simulation": simulation or {},
        }
        self.run = RunConfig.model_validate(values)
        randomness = Simulated(1)
        assume_identity(RUN_ID)
        app = client_app(task, self.run, owner=OPEN_POLICY, randomness=randomness)
        self.client = Client(task, self.run, OPEN_POLICY, randomness)
        self.worker = Worker(self.client, app, read_fleet(self.run, NAMES), {})
        self.start = pack(self.client.resident.model.model)
        config = dict(instruction_config(self.client.resident.layout, b""))
        config |= {"server-round": 1, "proximal-mu": mu}
        content = RecordDict({ARRAYS: weights_record(self.start), "config": ConfigRecord(config)})
        self.order = RoundTask("train", content)
        self.asked = [ClientRef(place + 1, name, None) for place, name in enumerate(NAMES)]

    def answers(self, method: Method) -> list[ClientOutcome]:
        self.worker.start_task(replace(self.order, method=method, chosen=True))
        return self.worker.work(self.asked)

    def weights(self, method: Method) -> dict[str, Vector | None]:
        return {one.client.name: weights_of(one) for one in self.answers(method)}

    def gap(self) -> float:
        """The largest between both ways, of each update's own length; both fail for the same."""
        alone, beside = self.weights("loop"), self.weights("vectorised")
        gaps = []
        for name, one in alone.items():
            other = beside[name]
            assert (one is None) == (other is None), name
            if one is not None and other is not None:
                gaps.append(np.linalg.norm(one - other) / np.linalg.norm(one - self.start))
        return float(max(gaps))

    def scheduler(self) -> WorkerScheduler:
        state = SimulationState()
        return WorkerScheduler(
            lambda: self.worker,
            lambda: self.worker,
            self.run.simulation,
            state=state,
            on_choice=lambda choice, workers: None,
        )


def weights_of(answer: ClientOutcome) -> Vector | None:
    if answer.content is None:
        return None
    return array_of(answer.content[ARRAYS][MODEL], where="test")  # type: ignore[arg-type]


def later(change: Callable[[Tensor, Tensor], Examples]) -> Task:
    """The task, where one later client's data are others."""

    def changed(name: str, folder: Folder) -> Examples:
        examples = data(name, folder)
        return change(*examples.tensors) if name == LATER else examples  # type: ignore[attr-defined]

    return replace(TASK, client_data=changed)


@pytest.mark.parametrize("rate", [0.1, 0.001])
@pytest.mark.parametrize(("decay", "mu"), [(1e-4, 0.0), (0.0, 0.01), (1e-5, 0.01)])
def test_weak_decay_is_not_lost_in_rounding(rate: float, decay: float, mu: float) -> None:
    """Against float64: in float32 both ways have errors of their own."""
    settings = {"learning_rate": rate, "weight_decay": decay, "epochs": 60}
    bench = Bench(TASK, client=settings, mu=mu)
    asked, start = bench.asked[0], dense().double()
    exact = dense().double()
    examples = data(asked.name, None)
    inputs, targets = examples.tensors  # type: ignore[attr-defined]
    optimizer = torch.optim.SGD(exact.parameters(), rate, weight_decay=decay)
    rng = torch_rng(1, "order", 1, asked.name)
    for _ in range(60):
        for rows in torch.randperm(len(inputs), generator=rng).split(5):
            optimizer.zero_grad()
            loss = functional.cross_entropy(exact(inputs[rows].double()), targets[rows])
            pairs = zip(exact.parameters(), start.parameters(), strict=True)
            loss = loss + mu / 2 * sum((p - q.detach()).square().sum() for p, q in pairs)
            loss.backward()
            optimizer.step()
    expected = np.concatenate([p.detach().numpy().ravel() for p in exact.parameters()])
    moved = np.linalg.norm(expected - bench.start)
    found = {way: bench.weights(way)[asked.name] for way in ("loop", "vectorised")}
    gaps = {way: np.linalg.norm(one - expected) / moved for way, one in found.items()}
    assert gaps["vectorised"] < 3 * gaps["loop"] + 1e-6, gaps


class Robust(nn.CrossEntropyLoss):
    """Made from cross-entropy, and another loss where it is large."""

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        return functional.cross_entropy(output, target, reduction="none").clamp(max=3).mean()


@pytest.mark.parametrize("privacy", [None, PRIVATE], ids=["plain", "private"])
def test_a_loss_made_from_cross_entropy_is_what_it_says(privacy: dict[str, Any] | None) -> None:
    task = later(lambda x, y: TensorDataset(20 * x, y))  # type: ignore[arg-type,return-value]
    assert Bench(replace(task, loss=Robust()), privacy=privacy).gap() < 1e-5


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e20])
def test_what_pads_poisons_nobody(value: float) -> None:
    """An example that no batch of the later client draws, and that pads all of them otherwise."""

    def spoilt(x: Tensor, y: Tensor) -> Examples:
        x = x.clone()
        x[0, 0] = value
        return TensorDataset(x, y)  # type: ignore[return-value]

    task = replace(later(spoilt), model=lambda: nn.Linear(4, 4))
    found = 0
    for size in (2, 3):  # few are drawn, so the first often is not
        bench = Bench(task, client={"batch_size": size}, privacy=PRIVATE)
        bench.gap()
        found += bench.weights("loop")[LATER] is not None
    assert found, "every batch held the example: choose another seed"


class Leaving(Dataset[tuple[Tensor, Tensor]]):
    def __len__(self) -> int:
        return 7

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
        raise SystemExit(3)


def test_a_data_set_that_ends_the_process_is_its_clients_failure() -> None:
    task = later(lambda x, y: Leaving())
    failed = {
        way: [one.client.name for one in Bench(task).answers(way) if one.error]  # type: ignore[arg-type]
        for way in ("loop", "vectorised")
    }
    assert failed == {"loop": [LATER], "vectorised": [LATER]}


class Normed(nn.Module):
    """No chain of products, so clients go side by side in another way."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.norm(self.first(x))))  # type: ignore[no-any-return]


class Mixing(Normed):
    """Mixes the examples of a batch, by functions."""

    def forward(self, x: Tensor) -> Tensor:
        x = functional.batch_norm(self.first(x), None, None, training=True)
        return self.last(torch.relu(self.norm(x)))  # type: ignore[no-any-return]


class Dropping(Normed):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(functional.dropout(x, 0.5, self.training))


class Unused(Normed):
    """Has a layer that nothing depends on: alone, its weights do not even decay."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Linear(3, 3)


class Looking(Normed):
    """Looks at a number, which no batch of clients has one of."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * (1.0 if self.last.bias.sum().item() < 1e9 else 2.0))


def clipped() -> nn.Module:
    model = Normed()
    for parameter in model.parameters():
        parameter.register_hook(lambda grads: grads.clamp(-1e-3, 1e-3))
    return model


def observed() -> nn.Module:
    """A chain of products whose first layer's results are limited by a hook."""
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
    model[0].register_forward_hook(lambda layer, given, found: found.clamp(-5, 5))
    return model


@pytest.mark.parametrize("model", [Dropping, Unused])
@pytest.mark.parametrize("mu", [0.0, 0.1])
def test_dropout_and_unused_weights_are_trained_as_alone(
    model: Callable[[], nn.Module], mu: float
) -> None:
    settings = {"weight_decay": 0.1, "epochs": 2}
    assert Bench(replace(TASK, model=model), client=settings, mu=mu).gap() < 1e-5


@pytest.mark.parametrize("model", [Mixing, Looking, clipped])
def test_what_one_look_shows_is_refused(model: Callable[[], nn.Module]) -> None:
    bench = Bench(replace(TASK, model=model), simulation={"training": "vectorised"})
    with pytest.raises(ConfigError, match=r"mixes|not depend on|hooks|batch of one|at once"):
        bench.scheduler().executor_for(bench.order, bench.asked)


def test_hooks_of_layers_are_called() -> None:
    task = later(lambda x, y: TensorDataset(20 * x, y))  # type: ignore[arg-type,return-value]
    assert Bench(replace(task, model=observed)).gap() < 1e-5


@pytest.mark.parametrize("chain", [True, False])
def test_a_loss_that_was_infinite_once_is_told(chain: bool) -> None:
    """In its first epoch; the weights stay finite."""

    class Spiked(nn.Module):
        def forward(self, output: Tensor, target: Tensor) -> Tensor:
            return functional.mse_loss(output.squeeze(1), target)

    def linear() -> nn.Module:
        layer = nn.Linear(1, 1)
        nn.init.ones_(layer.weight)
        return layer if chain else nn.Sequential(layer, nn.Hardshrink(0.0))

    def one(name: str, folder: Folder) -> Examples:
        target = 3e19 if name == LATER else 1.0
        return TensorDataset(torch.ones(1, 1), torch.full((1,), target))  # type: ignore[return-value]

    task = replace(
        TASK,
        kind="regression",
        model=linear,
        client_data=one,
        loss=Spiked(),
        metrics=None,
        example_input=torch.zeros(1),
    )
    bench = Bench(task, client={"learning_rate": 0.5, "epochs": 3, "batch_size": 1})
    failed = {
        way: [one.client.name for one in bench.answers(way) if one.error]  # type: ignore[arg-type]
        for way in ("loop", "vectorised")
    }
    assert failed["vectorised"] == failed["loop"] == [LATER]


def test_data_of_another_kind_are_their_clients_failure() -> None:
    task = later(lambda x, y: TensorDataset(x.to(torch.complex64), y))  # type: ignore[arg-type,return-value]
    bench = Bench(replace(task, model=Normed))
    failed = {
        way: [one.client.name for one in bench.answers(way) if one.error]  # type: ignore[arg-type]
        for way in ("loop", "vectorised")
    }
    assert failed["vectorised"] == failed["loop"] == [LATER]


@pytest.mark.parametrize("count", [1, 12])
def test_a_loss_that_is_a_sum_is_called_for_each_clients_batch(count: int) -> None:
    def summed(output: Tensor, target: Tensor) -> Tensor:
        return functional.cross_entropy(output, target, reduction="sum")

    task = replace(TASK, loss=summed, client_data=lambda name, folder: data(name, folder, count))
    assert Bench(task, client={"learning_rate": 0.01}).gap() < 1e-5


def test_who_is_away_is_not_compared_nor_timed(tmp_path: Path) -> None:
    """The first four never come: the ways are compared on those who do."""

    class Counting(Normed):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += self.training
            return super().forward(x * (1 + self.calls % 3))

    path = tmp_path / "trace.csv"
    rows = [
        f"{name},1000,10,10,{'1000000' if place < 4 else '0'},inf"
        for place, name in enumerate(NAMES)
    ]
    path.write_text("\n".join([",".join(COLUMNS), *rows]) + "\n")
    simulation = {"trace": str(path), "training": "auto"}
    bench = Bench(TASK, simulation=simulation)
    there = bench.worker.clients_in_time(bench.order, bench.asked)
    assert [one.name for one in there] == NAMES[4:]
    scheduler = bench.scheduler()
    scheduler.executor_for(bench.order, bench.asked)
    choice = scheduler._state.choice
    assert choice is not None
    assert choice.loop_s is not None
    assert choice.loop_s > 5e-4
    scheduler.close()
    forced = Bench(
        replace(TASK, model=Counting), simulation=simulation | {"training": "vectorised"}
    )
    with pytest.raises(ConfigError, match=r"gets a different update|mixes"):
        forced.scheduler().executor_for(forced.order, forced.asked)


def test_nothing_is_chosen_by_clients_that_fail() -> None:
    def broken(name: str, folder: Folder) -> Examples:
        raise OSError("its disk is gone")

    bench = Bench(replace(TASK, client_data=broken), simulation={"training": "vectorised"})
    scheduler = bench.scheduler()
    _, order = scheduler.executor_for(bench.order, bench.asked)
    assert (order.method, scheduler._state.choice) == ("loop", None)


def test_a_worker_whose_first_client_is_odd_trains_the_others_side_by_side() -> None:
    """As in a pool, where each worker looks at its own clients."""
    task = replace(
        later(lambda x, y: TensorDataset(x, torch.full_like(y, 2))),  # type: ignore[arg-type,return-value]
        loss=nn.CrossEntropyLoss(ignore_index=2),
    )
    bench = Bench(task)
    odd_first = [one for one in bench.asked if one.name == LATER] + bench.asked[:2]
    bench.worker.start_task(replace(bench.order, method="vectorised", chosen=True))
    found = bench.worker.work(odd_first)
    assert [one.error is None for one in found[1:]] == [True, True]
