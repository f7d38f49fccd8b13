from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional
from torch.utils.data import TensorDataset

from fedcore.config.run import ClientConfig
from fedcore.seeds import torch_rng
from fedcore.training import order as module
from fedcore.training.batches import shuffled
from fedcore.training.local import make_optimizer, train
from fedcore.training.order import ViewsOfAnyMemory, for_images

LAYERS = [nn.Conv2d, nn.ReLU, nn.MaxPool2d]


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2)),
        nn.Conv2d(4, 8, 3),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(3, stride=2, padding=1),
        nn.Flatten(),
        nn.Linear(32, 3),
    )


def trained(model: nn.Module, inputs: torch.Tensor, targets: torch.Tensor) -> list[torch.Tensor]:
    outputs = model(inputs)
    torch.autograd.backward(functional.cross_entropy(outputs, targets))
    return [outputs, *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which of ReLU and pooling ran, in their order."""
    order: list[str] = []

    def noted(kind: type[nn.Module]) -> Callable[[nn.Module, Tensor], Any]:
        forward = kind.forward

        def run(self: nn.Module, x: Tensor) -> Any:
            order.append(kind.__name__)
            return forward(self, x)

        return run

    for kind in (nn.ReLU, nn.MaxPool2d):
        monkeypatch.setattr(kind, "forward", noted(kind))
    moved = module._relu

    def relu(x: Tensor) -> Tensor:
        order.append("ReLU")
        return moved(x)

    monkeypatch.setattr(module, "_relu", relu)
    return order


def test_relu_behind_pooling_gives_the_same_bits(ran: list[str]) -> None:
    inputs = torch.randn(9, 1, 14, 14)
    inputs[0] = 0.0  # ties everywhere
    targets = torch.arange(9) % 3
    one = net()
    other = copy.deepcopy(one).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    with for_images(one) as images:
        assert images
        found = trained(one, inputs, targets)
    assert ran == ["MaxPool2d", "ReLU"] * 2
    ran.clear()
    expected = trained(other, inputs, targets)
    assert ran == ["ReLU", "MaxPool2d"] * 2
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "behind",
    [
        [nn.LeakyReLU(inplace=True)],
        [nn.MaxPool2d(2), nn.ReLU(inplace=True)],
        [nn.Flatten(1, 2), nn.Hardtanh(inplace=True)],
    ],
    ids=["at once", "after another pooling", "through a view"],
)
def test_layers_behind_may_overwrite_what_they_are_given(behind: list[nn.Module]) -> None:
    torch.manual_seed(0)
    one = nn.Sequential(
        *(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), *behind),
        *(nn.Flatten(), nn.LazyLinear(3)),
    )
    inputs, targets = torch.randn(9, 1, 14, 14), torch.arange(9) % 3
    one(inputs)
    other = copy.deepcopy(one).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    with for_images(one):
        found = trained(one, inputs, targets)
    for a, b in zip(found, trained(other, inputs, targets), strict=True):
        assert torch.equal(a, b)


def test_layers_stay_where_they_are() -> None:
    model = net()
    names = list(model.state_dict())
    modules = list(model.named_modules())
    with for_images(model):
        assert list(model.state_dict()) == names
        assert list(model.named_modules()) == modules
        assert [type(layer) for layer in model[0]] == LAYERS  # type: ignore[attr-defined]
        assert [type(layer) for layer in model[1:4]] == LAYERS  # type: ignore[attr-defined]
    assert [type(model), type(model[0])] == [nn.Sequential] * 2


def test_it_ends_with_the_training(ran: list[str]) -> None:
    model = net()
    with pytest.raises(KeyError), for_images(model):
        raise KeyError
    model(torch.randn(2, 1, 14, 14))
    assert ran == ["ReLU", "MaxPool2d"] * 2
    assert all(p.is_contiguous() for p in model.parameters())


class Looks(nn.Module):
    """Has a use for what stands between the layers of its `nn.Sequential`."""

    def __init__(self, walk: Callable[[nn.Sequential, Tensor], tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.f = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2))
        self.walk = walk
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x, middle = self.walk(self.f, x)
        return self.head(torch.cat([x.mean((2, 3)), middle.mean((2, 3))], 1))


def iterated(layers: nn.Sequential, x: Tensor) -> tuple[Tensor, Tensor]:
    middle = x
    for place, layer in enumerate(layers):
        x = layer(x)
        if place == 1:
            middle = x
    return x, middle


def indexed(layers: nn.Sequential, x: Tensor) -> tuple[Tensor, Tensor]:
    middle = layers[1](layers[0](x))
    return layers[2](middle), middle


def sliced(layers: nn.Sequential, x: Tensor) -> tuple[Tensor, Tensor]:
    middle = layers[:2](x)
    return layers[2:](middle), middle


def hooked(layers: nn.Sequential, x: Tensor) -> tuple[Tensor, Tensor]:
    seen: list[Tensor] = []
    handle = layers[1].register_forward_hook(lambda layer, given, made: seen.append(made))
    x = layers(x)
    handle.remove()
    return x, seen[0]


def kept(layers: nn.Sequential, x: Tensor) -> tuple[Tensor, Tensor]:
    """What a hook on a layer keeps is overwritten by the one behind it."""
    seen: list[Tensor] = []
    handle = layers[0].register_forward_hook(lambda layer, given, made: seen.append(made))
    x = layers(x)
    handle.remove()
    return x, seen[0]


def plainly(model: nn.Module, data: TensorDataset, settings: ClientConfig) -> None:
    optimizer = make_optimizer(model, settings)
    for inputs, targets in shuffled(data, settings.batch_size, torch_rng(0)):  # type: ignore[arg-type]
        optimizer.zero_grad()
        torch.autograd.backward(functional.cross_entropy(model(inputs), targets))
        optimizer.step()


@pytest.mark.parametrize("inplace", [False, True], ids=["", "in place"])
@pytest.mark.parametrize("walk", [iterated, indexed, sliced, hooked, kept])
def test_what_looks_between_the_layers_trains_as_torch_does(
    walk: Callable[[nn.Sequential, Tensor], tuple[Tensor, Tensor]], inplace: bool
) -> None:
    one = Looks(walk)
    one.f[1].inplace = inplace
    assert_trains_as_torch_does(one)


def assert_trains_as_torch_does(one: nn.Module) -> None:
    other = copy.deepcopy(one)
    data = TensorDataset(torch.randn(20, 1, 8, 8), torch.arange(20) % 3)
    settings = ClientConfig(batch_size=5, learning_rate=0.3)
    train(
        one,
        data,  # type: ignore[arg-type]
        functional.cross_entropy,
        settings,
        epochs=1,
        batch_size=5,
        rng=torch_rng(0),
    )
    plainly(other, data, settings)
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6, rtol=1e-5)


class Overwritten(nn.Module):
    """Reads what the first layer of its `nn.Sequential` works on in place."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(1, 4, 3)
        self.f = nn.Sequential(nn.ReLU(inplace=True), nn.MaxPool2d(2))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv(x)
        x = self.f(h)
        return self.head(torch.cat([x.mean((2, 3)), h.mean((2, 3))], 1))


def test_what_is_overwritten_for_others_too_is_overwritten() -> None:
    assert_trains_as_torch_does(Overwritten())


class Taken(nn.Module):
    """Takes apart what a convolution gives by its place in memory."""

    def __init__(self, flatten: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(1, 4, 3)
        self.flatten = flatten
        self.head = nn.Linear(144, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.flatten(self.conv(x)))


@pytest.mark.parametrize(
    "flatten",
    [
        lambda x: x.view(x.size(0), -1),
        lambda x: x.flatten(2).view(-1, 144),
        lambda x: x.view_as(torch.empty(len(x), 144)),
    ],
    ids=["view", "view of rows", "view as"],
)
def test_views_work_in_training_and_after_it(flatten: Callable[[Tensor], Tensor]) -> None:
    model = Taken(flatten)
    assert_trains_as_torch_does(model)
    assert model(torch.randn(2, 1, 8, 8)).shape == (2, 3)


def test_a_view_that_nothing_could_take_is_refused_as_by_torch() -> None:
    model = Taken(lambda x: x.view(len(x), 145))
    said = "invalid for input of size"
    with for_images(model), ViewsOfAnyMemory(), pytest.raises(RuntimeError, match=said):
        model(torch.randn(2, 1, 8, 8))


def test_a_copy_runs_its_own_layers(ran: list[str]) -> None:
    model = net()
    inputs = torch.randn(2, 1, 14, 14)
    with for_images(model):
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            ran.clear()
            with torch.no_grad():
                other[0][0].weight.zero_()
                assert not torch.equal(other(inputs), model(inputs))
            assert ran == ["MaxPool2d", "ReLU"] * 4


def test_what_is_traced_is_the_order_that_runs() -> None:
    model = net()
    with for_images(model):
        graph = fx.Tracer().trace(model)
    called = [node for node in graph.nodes if node.op in ("call_module", "call_function")]
    calls = ["ReLU" if node.op == "call_function" else str(node.target) for node in called]
    assert calls == ["0.0", "0.2", "ReLU", "1", "3", "ReLU", "4", "5"]


def test_a_model_without_convolutions_is_left_alone() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.MaxPool2d(2))
    with for_images(model) as images:
        assert not images
        assert type(model) is nn.Sequential


def test_pooling_that_gives_indices_stays_where_it_is() -> None:
    model = nn.Sequential(nn.Conv2d(1, 1, 1), nn.ReLU(), nn.MaxPool2d(2, return_indices=True))
    with for_images(model):
        values, _ = model(torch.randn(1, 1, 4, 4))
    assert values.shape == (1, 1, 2, 2)
    assert (values >= 0).all()


def test_a_relu_with_a_forward_of_its_own_stays_where_it_is() -> None:
    model = nn.Sequential(nn.Conv2d(1, 1, 1), nn.ReLU(), nn.MaxPool2d(2))
    model[1].forward = torch.neg
    inputs = torch.randn(1, 1, 4, 4)
    expected = model(inputs)
    with for_images(model):
        assert torch.equal(model(inputs), expected)
