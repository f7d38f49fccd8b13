"""Which models are chains of products, and which are left alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import TensorDataset

from fedcore.config.run import ClientConfig
from fedcore.privacy.accounting import Charge
from fedcore.privacy.draws import SimulatedDraws
from fedcore.privacy.planning import PrivatePlan
from fedcore.seeds import torch_rng
from fedcore.task.model import FullModel
from fedcore.training.per_example.chain import Chain, Conv, Run, torch_run
from fedcore.training.per_example.cpu import kernel_run
from fedcore.training.per_example.graph import find_chain
from fedcore.training.private import train_private
from fedcore.updates.pack import pack
from server.simulation.batched.chained import train_chained
from server.simulation.batched.work import LocalWork, PrivateWork
from tests.ways import way_of

IMAGE = torch.randn(2, 2, 8, 8)


def windows(model: nn.Module) -> list[tuple[int, int]]:
    chain = find_chain(model, IMAGE)
    assert chain is not None
    return [layer.window.pool for layer in chain.layers if isinstance(layer, Conv)]


def test_pooling_goes_into_the_convolution_before_it() -> None:
    conv, pool = nn.Conv2d(2, 4, 3), nn.MaxPool2d(2)
    assert windows(nn.Sequential(conv, nn.ReLU(), pool)) == [(2, 2)]
    assert windows(nn.Sequential(conv, pool, nn.ReLU())) == [(2, 2)]
    assert windows(nn.Sequential(conv, nn.ReLU())) == [(1, 1)]


@pytest.mark.parametrize(
    "pool",
    [
        nn.MaxPool2d(3, stride=1),
        nn.MaxPool2d(2, padding=1),
        nn.MaxPool2d(2, ceil_mode=True),
        nn.AvgPool2d(2),
    ],
    ids=["overlapping", "padded", "ceil", "mean"],
)
def test_pooling_of_another_kind_stays_behind_it(pool: nn.Module) -> None:
    assert windows(nn.Sequential(nn.Conv2d(2, 4, 3), pool)) == [(1, 1)]


def test_pooling_stays_where_something_else_lies_between() -> None:
    assert windows(nn.Sequential(nn.Conv2d(2, 4, 3), nn.GELU(), nn.MaxPool2d(2))) == [(1, 1)]


class Twice(nn.Module):
    """What the convolution gives is read by two."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        z = self.conv(x)
        return functional.max_pool2d(z, 2) * functional.max_pool2d(torch.tanh(z), 2)


def test_what_two_read_is_not_pooled() -> None:
    assert windows(Twice()) == [(1, 1)]


@pytest.mark.parametrize(
    "model",
    [
        nn.Conv2d(2, 4, 3, groups=2),
        nn.Conv2d(2, 4, 3, dilation=2),
        nn.Conv2d(2, 4, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(2, 4, 3, padding="same"),
        nn.ConvTranspose2d(2, 4, 3),
        nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4)),
        nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(0)),
    ],
    ids=["groups", "dilation", "reflect", "same", "transposed", "norm", "flat batch"],
)
def test_what_is_no_chain(model: nn.Module) -> None:
    assert find_chain(model, IMAGE) is None


def test_the_most_that_a_layer_makes() -> None:
    chain = find_chain(nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(144, 2)), IMAGE)
    assert chain is not None
    assert chain.numbers == 6 * 6 * 2 * 9


class Written(nn.Module):
    """A network whose way from its convolution to its head is written as a function."""

    def __init__(self, between: Callable[[Tensor], Tensor], columns: int = 4 * 36) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3)
        self.between = between
        self.head = nn.Linear(columns, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.between(torch.tanh(self.conv(x))))


FLAT: dict[str, Callable[[Tensor], Tensor]] = {
    "view size": lambda x: x.view(x.size(0), -1),
    "view shape": lambda x: x.view(x.shape[0], -1),
    "view size of all": lambda x: x.view(x.size()[0], -1),
    "view columns": lambda x: x.view(-1, 144),
    "view both": lambda x: x.view((x.size(0), 144)),
    "reshape size": lambda x: x.reshape(x.size(0), -1),
    "reshape shape": lambda x: x.reshape((x.shape[0], -1)),
    "reshape function": lambda x: torch.reshape(x, (x.shape[0], -1)),
    "flatten": lambda x: x.flatten(1),
    "flatten named": lambda x: x.flatten(start_dim=1),
    "flatten both": lambda x: x.flatten(1, -1),
    "flatten function": lambda x: torch.flatten(x, start_dim=1),
    "flatten end": lambda x: torch.flatten(x, 1, end_dim=-1),
    "flatten layer": nn.Flatten(),
    "divided": lambda x: (x / 3).flatten(1),
    "divided by a function": lambda x: torch.div(x, 0.5).flatten(1),
}
MEANS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda x: functional.avg_pool2d(x, 2).flatten(1),
    "mean with steps": lambda x: functional.avg_pool2d(x, 3, stride=2, padding=1).flatten(1),
    "mean of part": lambda x: functional.avg_pool2d(
        x, (2, 2), padding=1, stride=(3, 2), count_include_pad=False
    ).flatten(1),
}


@pytest.mark.parametrize("method", [torch_run, partial(kernel_run, per_example=True)])
@pytest.mark.parametrize("name", [*FLAT, *MEANS])
def test_what_is_found_learns_what_the_model_does(
    name: str, method: Callable[[Chain], Run | None]
) -> None:
    torch.manual_seed(0)
    between = FLAT.get(name) or MEANS[name]
    net = Written(between, between(torch.zeros(1, 4, 6, 6)).shape[1])
    model = FullModel(nn.Identity(), net)
    chain = find_chain(net, IMAGE)
    assert chain is not None
    run = method(chain)
    assert run is not None
    settings = ClientConfig(batch_size=4, learning_rate=0.1)
    plan = PrivatePlan(Charge(1, 1e-9, 0.5, 3), clip_norm=0.5)
    work = [
        LocalWork(
            TensorDataset(torch.randn(size, 2, 8, 8), torch.arange(size) % 3),  # type: ignore[arg-type]
            lambda: torch_rng(0, "order"),
            PrivateWork(plan, lambda device: torch_rng(0, "noise")),
        )
        for size in (9, 5)
    ]
    loss = functional.cross_entropy
    together = train_chained(model, chain, work, loss, settings, proximal_mu=0.0, run=run)
    before = torch.from_numpy(pack(net))
    found = way_of(net, loss, IMAGE[0])
    assert found.name == "chain"
    for one, weights in zip(work, together.weights, strict=True):
        alone = copy.deepcopy(net)
        train_private(
            nn.Identity(),
            alone,
            one.examples,
            loss,
            settings,
            plan,
            method=found,
            draws=SimulatedDraws(torch_rng(0, "order"), torch_rng(0, "noise")),
            proximal_mu=0.0,
        )
        expected = torch.from_numpy(pack(alone))
        moved = (expected - before).norm()
        assert moved > 0
        assert (expected - weights).norm() <= 1e-5 * moved


@pytest.mark.parametrize(
    "between",
    [
        lambda x: x.view(x.shape[1:][0] // 2, -1),
        lambda x: x.view(x.shape[1:][-3] - 2, -1),
        lambda x: x.view(2, -1),
        lambda x: x.view(x.size(0), -1) / x.size(0),
        lambda x: x.view(x.size(0), -1) / (x.flatten(1) + 2),
        lambda x: torch.div(x, 0.1, rounding_mode="floor").flatten(1),
        lambda x: x.flatten(2).flatten(1),
        lambda x: 1 / (x.flatten(1) + 2),
    ],
    ids=["cut", "channels", "two", "by count", "by itself", "rounded", "in parts", "inverse"],
)
def test_other_ways_to_flatten_and_divide_are_left_alone(
    between: Callable[[Tensor], Tensor],
) -> None:
    net = Written(between)
    assert net(IMAGE).shape == (2, 3)
    assert find_chain(net, IMAGE) is None


def test_rows_of_another_length_than_an_examples_are_no_chain() -> None:
    net = Written(lambda x: x.view(-1, 36), columns=36)
    assert net(IMAGE).shape == (8, 3)
    assert find_chain(net, IMAGE) is None


class InPlace(nn.Module):
    """What a layer works on in place is read by another one, too."""

    def __init__(self, layer: nn.Module, look: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.layer = layer
        self.look = look

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x.flatten(1))
        return self.layer(self.look(h)) + h


@pytest.mark.parametrize(
    "look",
    [lambda h: h, lambda h: h.flatten(1), lambda h: h.view(h.size(0), -1), nn.Identity()],
    ids=["itself", "flat", "view", "identity"],
)
def test_what_is_overwritten_and_read_elsewhere_is_no_chain(
    look: Callable[[Tensor], Tensor],
) -> None:
    inputs = 5 * torch.randn(4, 8)
    assert find_chain(InPlace(nn.Hardtanh(), look), inputs) is not None
    assert find_chain(InPlace(nn.Hardtanh(inplace=True), look), inputs) is None
    assert find_chain(InPlace(nn.Hardtanh(inplace=True), look), 1e-3 * inputs) is None


def test_what_is_overwritten_may_be_asked_for_its_shape() -> None:
    class Asked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(2, 4, 3)
            self.relu = nn.ReLU(inplace=True)

        def forward(self, x: Tensor) -> Tensor:
            h = self.conv(x)
            examples = h.size(0)
            return self.relu(h).view(examples, -1)

    assert find_chain(Asked(), IMAGE) is not None


class KeptOff(nn.Module):
    """A model whose dropout is off in training, too."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.drop, self.head = nn.Linear(6, 5), nn.Dropout(0.5), nn.Linear(5, 3)

    def train(self, mode: bool = True) -> KeptOff:
        super().train(mode)
        self.drop.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = self.head(self.drop(torch.relu(self.first(x))))
        return outputs


def test_a_dropout_that_a_model_keeps_off_drops_nothing_in_its_chain() -> None:
    inputs = torch.randn(4, 6)
    kept = find_chain(KeptOff().eval(), inputs)
    dropping = find_chain(nn.Sequential(nn.Linear(6, 5), nn.Dropout(0.5)).eval(), inputs)
    assert kept is not None
    assert dropping is not None
    assert (kept.drops, dropping.drops) == (False, True)


@pytest.mark.parametrize("width", [1, 4])
def test_a_mean_that_keeps_its_dimension_is_no_chain(width: int) -> None:
    class Centred(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            h = self.layer(x)
            return (h - h.mean(1, True)).flatten(1)

    assert find_chain(Centred(), torch.randn(width, width, 6)) is None
