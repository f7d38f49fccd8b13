"""Gradients of single examples where weights are shared: between layers, and over the batch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from fedcore.seeds import torch_rng
from tests.ways import way_of, weighted

VOCABULARY, LENGTH, WIDTH = 12, 5, 8


class Positions(nn.Module):
    """Adds an embedding of each position, read once for the batch or for each example."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        self.tokens, self.places = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.free = nn.Parameter(torch.randn(LENGTH, WIDTH, generator=torch_rng(0)))
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, x: Tensor) -> Tensor:
        order = torch.arange(x.shape[1])
        added = {
            "over the batch": lambda: self.places(order),
            "a batch of one": lambda: self.places(order[None]),
            "each example": lambda: self.places(order.expand(len(x), -1)),
            "a parameter": lambda: self.free,
            "a slice of one": lambda: self.free[None, : x.shape[1]],
        }[self.form]()
        outputs: Tensor = self.head(torch.relu(self.tokens(x) + added))
        return outputs


class Tied(nn.Module):
    """A head with the weights of the embedding, through the layer or through a function."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        self.tokens, self.mix = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=form == "tied with a bias")
        if form != "used twice":
            self.head.weight = self.tokens.weight

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.mix(self.tokens(x)))
        if self.form == "used twice":
            return functional.linear(hidden, self.tokens.weight, self.head.bias)
        outputs: Tensor = self.head(hidden)
        return outputs


FORMS = ["over the batch", "a batch of one", "each example", "a parameter", "a slice of one"]
MODELS = [(Positions, form) for form in FORMS]
MODELS += [(Tied, form) for form in ("tied", "tied with a bias", "used twice")]  # type: ignore[misc]


def loss(outputs: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(outputs.transpose(1, 2), targets)


@pytest.mark.parametrize(("kind", "form"), MODELS)
def test_each_examples_gradient_is_that_of_a_batch_of_one(kind: type[nn.Module], form: str) -> None:
    torch.manual_seed(0)
    model = kind(form)
    inputs, targets = torch.randint(VOCABULARY, (2, 7, LENGTH), generator=torch_rng(1))
    way = way_of(model, loss, inputs[0], "next_token")
    share = torch.linspace(0.5, 1.5, len(inputs))
    part = way.compute(nn.Identity(), model, inputs, targets)
    parameters = list(model.parameters())  # a shared one once
    alone = [
        torch.autograd.grad(
            loss(model(one[None]), target[None]),
            parameters,
            allow_unused=True,
            materialize_grads=True,
        )
        for one, target in zip(inputs, targets, strict=True)
    ]
    sums = [
        sum(weight * one for weight, one in zip(share, found, strict=True))
        for found in zip(*alone, strict=True)
    ]
    for found, expected in zip(weighted(part, model, share), sums, strict=True):
        assert torch.allclose(found, torch.as_tensor(expected), rtol=1e-4, atol=1e-6)
    squares = torch.stack([sum(one.square().sum() for one in each) for each in alone])  # type: ignore[misc]
    assert torch.allclose(part.squares.float(), squares, rtol=1e-4)
