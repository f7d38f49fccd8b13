"""Gradients of one client's convolutions by products, against ordinary backward passes."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from fedcore.training.per_example.chain import torch_run
from fedcore.training.per_example.gradient_methods import (
    GradientMethod,
    GradientPart,
    chain_method,
    one_by_one,
)
from fedcore.training.per_example.graph import find_chain
from fedcore.training.per_example.runs import compiled_run
from tests.ways import weighted

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


ROWS = nn.Sequential(  # no whole vectors of channels
    *(nn.Conv2d(1, 5, 3), nn.ReLU(), nn.MaxPool2d(2)),
    *(nn.Conv2d(5, 6, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(150, 3)),
)
TILES = nn.Sequential(  # what compiled loops take by tiles
    *(nn.Conv2d(1, 16, 4, bias=False), nn.ReLU()),
    *(nn.Conv2d(16, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
    *(nn.Conv2d(8, 8, 3, padding=1), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(32, 3)),
)
MODELS = {"wide": WIDE, "uneven": UNEVEN, "rows": ROWS, "tiles": TILES}
each_model = pytest.mark.parametrize("model", MODELS.values(), ids=list(MODELS))


@pytest.fixture(params=["torch", "compiled"])
def way(request: pytest.FixtureRequest, model: nn.Module) -> GradientMethod:
    chain = find_chain(model, torch.zeros(1, 1, 13, 13))
    assert chain is not None
    run = (
        torch_run(chain)
        if request.param == "torch"
        else compiled_run(chain, model, per_example=True)
    )
    assert run is not None
    return chain_method(chain, run, LOSS)


def taken(
    way: GradientMethod, model: nn.Module, value: float | None = None, places: int = 6
) -> GradientPart:
    """The gradients of made-up examples, or of some with one value all over the first."""
    rng = torch.Generator().manual_seed(0)
    inputs = torch.randn(places, 1, 13, 13, generator=rng)
    if value is not None:
        inputs[0] = value
    return way.compute(nn.Identity(), model, inputs, torch.arange(places) % 3)


@each_model
@pytest.mark.parametrize("places", [1, 6, 40])
def test_gradients_are_those_of_a_backward_pass(
    model: nn.Module, way: GradientMethod, places: int
) -> None:
    alone = one_by_one(LOSS, why="")
    found, right = (taken(one, model, places=places) for one in (way, alone))
    torch.testing.assert_close(found.squares, right.squares.double(), rtol=1e-5, atol=0)
    share = torch.linspace(0.2, 1, places)
    for one, other in zip(*(weighted(one, model, share) for one in (found, right)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@each_model
@pytest.mark.parametrize("value", [0.5, 1e38, torch.inf, torch.nan])
def test_other_examples_are_the_same_bits_when_one_is_replaced(
    model: nn.Module, way: GradientMethod, value: float
) -> None:
    first, second = taken(way, model), taken(way, model, value)
    assert torch.equal(first.squares[1:], second.squares[1:])
    assert bool(second.usable[1:].all())
    if value != 1e38:  # whether its finite sums overflow depends on the processor's order
        assert bool(second.usable[0]) is (value == 0.5)
    for place in range(1, 6):
        share = functional.one_hot(torch.tensor(place), 6).float()
        for one, two in zip(*(weighted(one, model, share) for one in (first, second)), strict=True):
            assert torch.equal(one, two)


@each_model
def test_what_is_added_for_an_example_is_as_long_as_is_said(
    model: nn.Module, way: GradientMethod
) -> None:
    part = taken(way, model)
    for place in range(6):
        found = weighted(part, model, functional.one_hot(torch.tensor(place), 6).float())
        length = torch.cat([one.flatten().double() for one in found]).norm()
        assert length.square().item() == pytest.approx(float(part.squares[place]), rel=1e-6)
