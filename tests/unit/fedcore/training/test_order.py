from __future__ import annotations

import copy

import torch
from torch import nn
from torch.nn import functional

from fedcore.training.order import for_images


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


def test_relu_behind_pooling_gives_the_same_bits() -> None:
    inputs = torch.randn(9, 1, 14, 14)
    inputs[0] = 0.0  # ties everywhere
    targets = torch.arange(9) % 3
    one = net()
    other = copy.deepcopy(one).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    names = list(one.state_dict())
    assert for_images(one)
    assert list(one.state_dict()) == names
    assert [type(layer) for layer in one[0]] == [nn.Conv2d, nn.MaxPool2d, nn.ReLU]
    assert [type(layer) for layer in one[2:4]] == [nn.MaxPool2d, nn.ReLU]
    for a, b in zip(trained(one, inputs, targets), trained(other, inputs, targets), strict=True):
        assert torch.equal(a, b)


def test_it_is_done_once() -> None:
    model = net()
    for_images(model)
    before = [type(layer) for layer in model.modules()]
    for_images(model)
    assert [type(layer) for layer in model.modules()] == before


def test_a_model_without_convolutions_is_left_alone() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.MaxPool2d(2))
    assert not for_images(model)
    assert isinstance(model[1], nn.ReLU)


def test_pooling_that_gives_indices_stays_where_it_is() -> None:
    model = nn.Sequential(nn.Conv2d(1, 1, 1), nn.ReLU(), nn.MaxPool2d(2, return_indices=True))
    for_images(model)
    assert isinstance(model[1], nn.ReLU)
