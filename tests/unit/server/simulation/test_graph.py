"""Which models are chains of products, and which are left alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from server.simulation.chain import Conv
from server.simulation.graph import find_chain

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
        nn.Sequential(nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4)),
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
