"""What shows only on some clients or in some groups: refused, or learnt as if alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.data import TensorDataset

from fedcore.config.run import ClientConfig
from fedcore.errors import ConfigError
from fedcore.seeds import torch_rng
from fedcore.task.definition import Examples, Folder
from fedcore.task.model import FullModel
from fedcore.training.dropout import WithoutDropout
from server.simulation.batched.stacked.train import train_stacked
from server.simulation.batched.trainer import Trainer, find_trainer
from server.simulation.batched.work import LocalWork
from tests.unit.server.simulation.batched.test_same_as_alone import NAMES, TASK, Bench, Normed
from tests.unit.server.simulation.batched.test_stacked import both, classify

T, D, CLASSES = 5, 6, 4


def unequal(name: str, folder: Folder) -> Examples:
    """Windows of clients that all take another number of steps, so that none run together."""
    inputs = torch.randn(5 * (1 + NAMES.index(name)), T, D, generator=torch_rng(0, name))
    return TensorDataset(inputs, inputs[:, 0, :CLASSES].argmax(1))  # type: ignore[return-value]


class StepsFirst(nn.Module):
    """Joins steps and examples in an order in which clients' rows alternate."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.LSTM(D, D), nn.Linear(D, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        found, _ = self.layer(x.transpose(0, 1))
        each = self.head(found.reshape(-1, D))
        return each.view(T, len(x), -1).mean(0)  # type: ignore[no-any-return]


def test_rows_of_clients_that_alternate_are_refused_where_the_first_clients_train_alone() -> None:
    task = replace(TASK, model=StepsFirst, client_data=unequal, example_input=torch.zeros(T, D))
    bench = Bench(task, simulation={"training": "vectorised"})
    with pytest.raises(ConfigError, match="confuses the examples of clients"):
        bench.scheduler().executor_for(bench.order, bench.asked)


class Constants(nn.Module):
    """Selects as many rows of a weight as some groups of clients have examples."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.norm = nn.Parameter(torch.randn(50, 6)), nn.LayerNorm(6)
        self.head = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.table[torch.arange(24)]
        return self.head(self.norm(x) + rows.mean(0) * rows[0])  # type: ignore[no-any-return]


@pytest.mark.parametrize("sizes", [(8, 8), (8, 8, 8), (6, 6, 6, 6), (12, 12)])
def test_a_constant_as_long_as_a_groups_batches_is_no_batch(sizes: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    settings = ClientConfig(batch_size=12, learning_rate=0.1)
    for distance, *_ in both(Constants(), classify, functional.cross_entropy, settings, sizes, 0.0):
        assert distance <= 1e-5


class Scaling(Normed):
    """Scales data that look like bytes, as all clients' do where one client's do."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x / 255 if x.max() > 50 else x)


class Masked(Normed):
    """Runs its layers on the rows that are not empty."""

    def forward(self, x: Tensor) -> Tensor:
        found = torch.zeros(len(x), 4)
        there = x.abs().sum(1) > 0
        found[there] = super().forward(x[there])
        return found


class Cut(Normed):
    """Cuts its inputs at the largest length in the batch."""

    def forward(self, x: Tensor) -> Tensor:
        length = (x > -9).sum(1).max()
        return super().forward(functional.pad(x[:, :length], (0, 4))[:, :4])


class Counted(Normed):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * (1 + 0 * len(torch.unique(x))))


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (Scaling, "code depends on the values of its examples"),
        (Masked, "selects a part of a batch by the values"),
        (Cut, "selects a part of a batch by the values"),
        (Counted, "the size of a result depends on the values"),
    ],
)
def test_code_and_shapes_that_depend_on_examples_are_refused(
    model: Callable[[], nn.Module], says: str
) -> None:
    """Where the first clients' examples decide alike, no comparison shows that others' do not."""
    bench = Bench(replace(TASK, model=model), simulation={"training": "vectorised"})
    with pytest.raises(ConfigError, match=says):
        bench.scheduler().executor_for(bench.order, bench.asked)


def test_masks_that_select_nothing_and_checks_of_other_tensors_are_not_refused() -> None:
    class Checking(Normed):
        def forward(self, x: Tensor) -> Tensor:
            places = torch.arange(x.shape[1])
            assert places.max() < 4
            assert bool((places >= 0).all())
            x = torch.where(x > 0, x, 0.1 * x)
            x[x > 5] = 5.0
            return super().forward(x[:, places])

    assert Bench(replace(TASK, model=Checking)).gap() < 1e-5


@pytest.mark.parametrize(
    "layer",
    [
        nn.MultiheadAttention(D, 2, 0.3, batch_first=True),
        nn.GRU(D, D, 2, batch_first=True, dropout=0.3),
    ],
    ids=["attention", "gru"],
)
def test_layers_that_drop_are_trained_together_and_not_one_by_one(layer: nn.Module) -> None:
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.head = copy.deepcopy(layer), nn.Linear(D, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            given = (x, x, x) if isinstance(self.layer, nn.MultiheadAttention) else (x,)
            return self.head(self.layer(*given)[0][:, -1])  # type: ignore[no-any-return]

    task = replace(TASK, model=Reader, client_data=unequal, example_input=torch.zeros(T, D))
    bench = Bench(task)
    work = LocalWork(unequal(NAMES[1], None), lambda: torch_rng(0))
    found = find_trainer(bench.client, bench.client.resident, work, bench.run.client)
    assert isinstance(found, Trainer), found
    assert bench.gap() < 1e-5


@pytest.mark.parametrize("lengths", [None, (3, 1)])
def test_without_dropout_nothing_is_dropped(lengths: tuple[int, ...] | None) -> None:
    layer, x = nn.GRU(D, D, 2, batch_first=True, dropout=0.5), torch.randn(2, T, D)
    given = x if lengths is None else pack_padded_sequence(x, list(lengths), batch_first=True)
    with WithoutDropout():
        found = layer(given)[1]
    assert torch.equal(found, layer.eval()(given)[1])


def test_a_loss_that_needs_two_rows_has_them_side_by_side_too() -> None:
    """A client's last batch of one row joins the batch before, as on a device."""

    def ignoring(name: str, folder: Folder) -> Examples:
        inputs = torch.randn(11, 4, generator=torch_rng(0, name))
        targets = inputs[:, :2].argmax(1)
        targets[0] = 2
        return TensorDataset(inputs, targets)  # type: ignore[return-value]

    task = replace(
        TASK, model=Normed, client_data=ignoring, loss=nn.CrossEntropyLoss(ignore_index=2)
    )
    bench = Bench(task)
    assert all(one is not None for one in bench.weights("loop").values())
    assert bench.gap() < 1e-5


def test_what_pads_a_batch_is_of_that_batch() -> None:
    """A row that no batch of few steps has may overflow."""
    model = FullModel(nn.Identity(), Normed())
    inputs = torch.randn(4, 4, generator=torch_rng(0))
    assert 0 not in torch.randperm(4, generator=torch_rng(1))[:3]
    inputs[0] = 1e30
    work = [LocalWork(TensorDataset(inputs, inputs.argmax(1)), lambda: torch_rng(1))] * 2  # type: ignore[arg-type]
    settings = ClientConfig(batch_size=3, steps=1)
    trained = train_stacked(model, work, functional.cross_entropy, settings, proximal_mu=0.0)
    assert torch.isfinite(trained.weights).all()
