"""Layers and functions with weights, and dropout: clients that run together learn as if alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import TensorDataset

from fedcore.config.run import ClientConfig
from fedcore.seeds import torch_rng
from fedcore.task.adapters import with_adapters
from fedcore.task.definition import Examples
from fedcore.task.model import FullModel
from server.simulation.batched.stacked.supported import mixes_examples
from server.simulation.batched.stacked.train import train_stacked
from server.simulation.batched.stacked.weights import NotStackable
from server.simulation.batched.work import LocalWork
from tests.unit.server.simulation.batched.test_stacked import Make, both

T, D, CLASSES = 5, 8, 3
SIZES = (12, 12, 7, 1)
SETTINGS = ClientConfig(batch_size=4, learning_rate=0.1, epochs=2)


def sequences(count: int, rng: torch.Generator) -> Examples:
    inputs = torch.randn(count, T, D, generator=rng)
    return TensorDataset(inputs, inputs[:, :, 0].sum(1).gt(0).long())  # type: ignore[return-value]


def tokens(count: int, rng: torch.Generator) -> Examples:
    rows = torch.randint(0, 11, (count, T), generator=rng)
    return TensorDataset(rows, rows[:, 0] % CLASSES)  # type: ignore[return-value]


def images(count: int, rng: torch.Generator) -> Examples:
    inputs = torch.randn(count, 2, 6, 6, generator=rng)
    return TensorDataset(inputs, inputs.mean((1, 2, 3)).gt(0).long())  # type: ignore[return-value]


class Net(nn.Module):
    """A function over two modules."""

    def __init__(
        self,
        run: Callable[[nn.Module, nn.Module, Tensor], Tensor],
        one: nn.Module,
        other: nn.Module,
    ) -> None:
        super().__init__()
        self.run, self.one, self.other = run, one, other

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self.one, self.other, x)


def last_of(one: nn.Module, other: nn.Module, x: Tensor) -> Tensor:
    return other(one(x)[0][:, -1])  # type: ignore[no-any-return]


def state_of(one: nn.Module, other: nn.Module, x: Tensor) -> Tensor:
    _, state = one(x)
    hidden = state[0] if isinstance(state, tuple) else state
    return other(torch.cat(list(hidden), dim=1))  # type: ignore[no-any-return]


def cell_of(one: nn.Module, other: nn.Module, x: Tensor) -> Tensor:
    hidden, (_, cell) = one(x)
    return other(hidden.mean(1) + cell[-1])  # type: ignore[no-any-return]


def steps_first(one: nn.Module, other: nn.Module, x: Tensor) -> Tensor:
    return other(one(x.transpose(0, 1))[0][-1])  # type: ignore[no-any-return]


def attending(one: nn.Module, other: nn.Module, x: Tensor) -> Tensor:
    return other(one(x, x, x)[0].mean(1))  # type: ignore[no-any-return]


def attending_to_some(one: nn.Module, other: nn.Module, x: Tensor) -> Tensor:
    padding = torch.arange(T).expand(len(x), T) >= 1 + (x[:, :1, 0] > 0).long() * 3
    mask = torch.ones(T, T, dtype=torch.bool).triu(1)
    found = one(x, x * 2, x * 2, key_padding_mask=padding, attn_mask=mask, need_weights=False)
    return other(found[0][:, -1])  # type: ignore[no-any-return]


def attending_where_all_is_masked(one: nn.Module, other: nn.Module, x: Tensor) -> Tensor:
    mask = (x[:, None, None, :, 0] < 0.3).expand(-1, 1, T, T)  # for some examples nothing is left
    query, key, value = one(x).unsqueeze(1).chunk(3, dim=-1)
    found = functional.scaled_dot_product_attention(query, key, value, ~mask, 0.4)
    return other(found.squeeze(1).mean(1))  # type: ignore[no-any-return]


def averaged(one: nn.Module, other: nn.Module, x: Tensor) -> Tensor:
    return other(one(x).mean(1))  # type: ignore[no-any-return]


class Tokens(nn.Module):
    """Class token, positions, a scale and a tied-looking product, with weights of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, D, padding_idx=0)
        self.token, self.scale = nn.Parameter(torch.randn(1, 1, D)), nn.Parameter(torch.ones(D))
        self.places = nn.Parameter(torch.randn(1, T + 1, D))
        self.mix, self.head = nn.Parameter(torch.randn(D, D)), nn.Linear(D, CLASSES)
        self.register_buffer("mask", torch.eye(D), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.token.expand(len(x), -1, -1), self.embed(x)], dim=1) + self.places
        x = functional.dropout((x * self.scale) @ (self.mix * (1 + self.mask)), 0.3, self.training)
        weight = self.head.weight / self.head.weight.norm(dim=1, keepdim=True)
        return functional.linear(x[:, 0].tanh(), weight, self.head.bias)


class Places(nn.Module):
    """Looks positions up, which are no examples, once for all of them and once for each."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.places = nn.Embedding(11, D), nn.Embedding(T, D)
        self.last = nn.Embedding(T, D, padding_idx=T - 1)
        self.head = nn.Linear(D, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        places = torch.arange(x.shape[1])
        x = self.embed(x) + self.places(places) * self.last(places)
        x = x + self.places(places.expand(len(x), -1))
        return self.head(x.tanh().mean(1))  # type: ignore[no-any-return]


def encoder(**options: object) -> nn.Module:
    return nn.TransformerEncoderLayer(D, 2, 16, batch_first=True, **options)  # type: ignore[arg-type]


def head(size: int = D) -> nn.Linear:
    return nn.Linear(size, CLASSES)


def deep(cell: type[nn.Module], **options: object) -> nn.Module:
    return cell(D, D, num_layers=2, batch_first=True, **options)


torch.manual_seed(0)  # initial weights of the models below
CASES: dict[str, tuple[nn.Module, Make]] = {
    "gru": (Net(last_of, nn.GRU(D, D, batch_first=True), head()), sequences),
    "gru, hidden sizes that fill no vector": (
        Net(last_of, nn.GRU(D, 5, batch_first=True, bias=False), head(5)),
        sequences,
    ),
    "gru, deep, both ways, dropout": (
        Net(state_of, deep(nn.GRU, bidirectional=True, dropout=0.4), head(4 * D)),
        sequences,
    ),
    "gru, steps first": (Net(steps_first, nn.GRU(D, D), head()), sequences),
    "lstm": (Net(cell_of, nn.LSTM(D, D, batch_first=True), head()), sequences),
    "lstm, deep, both ways, dropout": (
        Net(state_of, deep(nn.LSTM, bidirectional=True, dropout=0.4), head(4 * D)),
        sequences,
    ),
    "plain recurrent": (Net(last_of, deep(nn.RNN), head()), sequences),
    "plain recurrent, relu": (Net(last_of, deep(nn.RNN, nonlinearity="relu"), head()), sequences),
    "attention": (
        Net(attending, nn.MultiheadAttention(D, 2, batch_first=True, dropout=0.2), head()),
        sequences,
    ),
    "attention with masks": (
        Net(attending_to_some, nn.MultiheadAttention(D, 2, batch_first=True), head()),
        sequences,
    ),
    "attention with dropout where all is masked": (
        Net(attending_where_all_is_masked, nn.Linear(D, 3 * D), head()),
        sequences,
    ),
    "transformer": (Net(averaged, encoder(dropout=0.1), head()), sequences),
    "transformer, norm first": (
        Net(averaged, encoder(dropout=0.0, norm_first=True), head()),
        sequences,
    ),
    "transformer with adapters": (
        with_adapters(Net(averaged, encoder(dropout=0.0), head()), rank=2, trained=["other.*"]),
        sequences,
    ),
    "frozen convolution": (
        nn.Sequential(
            *(nn.Conv2d(2, 4, 3).requires_grad_(False), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)),
        ),
        images,
    ),
    "tokens": (Tokens(), tokens),
    "places": (Places(), tokens),
    "group norm": (
        nn.Sequential(
            *(nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Dropout2d(0.3)),
            *(nn.MaxPool2d(2), nn.Flatten(), nn.Dropout(0.2), nn.Linear(16, CLASSES)),
        ),
        images,
    ),
    "instance norm and others": (
        nn.Sequential(
            *(nn.Conv2d(2, 4, 3), nn.InstanceNorm2d(4, affine=True), nn.PReLU(4), nn.Flatten()),
            *(nn.RMSNorm(64), nn.Linear(64, 8), nn.LayerNorm(8), nn.Linear(8, CLASSES)),
        ),
        images,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_each_layer_learns_what_it_would_alone(name: str) -> None:
    net, make = CASES[name]
    found = both(net, make, functional.cross_entropy, SETTINGS, SIZES, 0.0)
    for distance, alone, together in found:
        assert distance <= 2e-5
        assert together == pytest.approx(alone, rel=1e-5)


def test_a_nan_of_one_client_stays_its_own() -> None:
    model = FullModel(nn.Identity(), Net(last_of, nn.GRU(D, D, batch_first=True), head()))
    good, bad = (sequences(4, torch_rng(0)) for _ in range(2))
    bad.tensors[0][1, 2, 3] = float("nan")  # type: ignore[attr-defined]
    work = [LocalWork(one, lambda: torch_rng(0)) for one in (good, bad)]
    trained = train_stacked(model, work, functional.cross_entropy, SETTINGS, proximal_mu=0.0)
    assert torch.isfinite(trained.weights[0]).all()
    assert trained.losses[0] == trained.losses[0]
    assert trained.losses[1] != trained.losses[1]


def test_a_token_that_no_row_has_is_an_error_and_not_another_clients_row() -> None:
    model = FullModel(
        nn.Identity(), nn.Sequential(nn.Embedding(7, 4), nn.Flatten(), nn.Linear(20, 3))
    )
    work = [LocalWork(tokens(4, torch_rng(0)), lambda: torch_rng(0))] * 2
    loss = functional.cross_entropy
    with pytest.raises(IndexError, match="no row"):
        train_stacked(model, work, loss, SETTINGS, proximal_mu=0.0, sizes=frozenset({4, 7, 20}))


class Reading(nn.Module):
    """Its steps depend on a weight's value."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x if self.linear.weight.sum() > 0 else -x)  # type: ignore[no-any-return]


class OwnFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor, weight: Tensor) -> Tensor:
        return x * weight

    @staticmethod
    def backward(ctx: object, grads: Tensor) -> tuple[Tensor, Tensor]:
        return grads, grads


class OwnGradient(nn.Module):
    """Hands its weight to a function that torch does not show."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.linear = nn.Parameter(torch.ones(6)), nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(OwnFunction.apply(x, self.weight))  # type: ignore[no-any-return]


class Turned(nn.Module):
    """Looks up tokens whose batch is not their first dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(2, 6), nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.embed((x > 0).long().t()).mean(0))  # type: ignore[no-any-return]


class Overwriting(nn.Module):
    """Changes its weight in its forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.linear.weight.clamp_(-1, 1)
        return self.linear(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("model", [Reading, OwnGradient, Overwriting, Turned])
def test_what_cannot_run_together_is_refused(model: Callable[[], nn.Module]) -> None:
    inputs = torch.randn(8, 6, generator=torch_rng(0))
    examples = TensorDataset(inputs, inputs.argmax(1) % CLASSES)
    work = [LocalWork(examples, lambda: torch_rng(0))] * 2  # type: ignore[arg-type]
    with pytest.raises(NotStackable):
        train_stacked(
            FullModel(nn.Identity(), model()),
            work,
            functional.cross_entropy,
            SETTINGS,
            proximal_mu=0.0,
        )


def test_a_transformer_layer_is_tried_without_its_dropout() -> None:
    inputs = torch.randn(3, T, D)
    layer = nn.TransformerEncoderLayer(D, 2, 16, dropout=0.5, batch_first=True)
    assert mixes_examples(layer, inputs) == ""
    attention = Net(lambda one, _, x: one(x, x, x)[0], nn.MultiheadAttention(D, 2), nn.Identity())
    assert "mixes the examples of a batch" in mixes_examples(attention, inputs)
