"""Gradients of one client's convolutions by products, against ordinary backward passes."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from fedcore.training.per_example.graph import find_chain
from fedcore.training.per_example.ways import Part, by_chain, one_by_one

LOSS = functional.cross_entropy
WIDE = nn.Sequential(  # more results than numbers that each is made of, then fewer
    *(nn.Conv2d(1, 32, 3), nn.ReLU(), nn.MaxPool2d(2)),
    *(nn.Conv2d(32, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(72, 3)),
)
UNEVEN = nn.Sequential(  # strides, padding, and rows that no block of the pooling covers
    *(nn.Conv2d(1, 12, (2, 3), padding=(1, 2)), nn.MaxPool2d((2, 3)), nn.ReLU()),
    *(nn.Conv2d(12, 20, 3, stride=(1, 2), padding=1, bias=False), nn.MaxPool2d(2)),
    *(nn.Flatten(), nn.Linear(60, 3)),
)


def taken(model: nn.Module, *, alone: bool, other: bool = False) -> Part:
    rng = torch.Generator().manual_seed(0)
    inputs = torch.randn(6, 1, 13, 13, generator=rng)
    targets = torch.arange(6) % 3
    if other:
        inputs[0] = torch.randn(1, 13, 13, generator=rng)
    chain = find_chain(model, inputs)
    assert chain is not None
    way = one_by_one(LOSS, why="") if alone else by_chain(chain, LOSS)
    return way.take(nn.Identity(), model, inputs, targets)


@pytest.mark.parametrize("model", [WIDE, UNEVEN], ids=["wide", "uneven"])
def test_gradients_are_those_of_a_backward_pass(model: nn.Module) -> None:
    found, right = taken(model, alone=False), taken(model, alone=True)
    torch.testing.assert_close(found.squares, right.squares.double(), rtol=1e-5, atol=0)
    share = torch.linspace(0.2, 1, 6)
    for one, other in zip(found.weighted(share), right.weighted(share), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("model", [WIDE, UNEVEN], ids=["wide", "uneven"])
def test_other_examples_are_the_same_bits_when_one_is_replaced(model: nn.Module) -> None:
    first, second = taken(model, alone=False), taken(model, alone=False, other=True)
    assert torch.equal(first.squares[1:], second.squares[1:])
    assert not torch.equal(first.squares[0], second.squares[0])
    for place in range(1, 6):
        share = functional.one_hot(torch.tensor(place), 6).float()
        for one, two in zip(first.weighted(share), second.weighted(share), strict=True):
            assert torch.equal(one, two)
