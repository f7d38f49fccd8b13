"""A convolution with its pooling and ReLU is torch's, forth and back, by rows and by tiles."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from server.simulation.chain import Conv, Made, stacked
from server.simulation.convolution import convolution
from server.simulation.graph import find_chain
from server.simulation.images import Window
from server.simulation.straight import by_kernels
from server.simulation.winograd import LANE

PAIRS = st.tuples(st.integers(1, 3), st.integers(1, 3))
TILED = st.builds(
    Window,
    kernel=st.just((3, 3)),
    stride=st.just((1, 1)),
    padding=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    pool=st.just((2, 2)),
)
ANY = st.builds(
    Window,
    kernel=PAIRS,
    stride=PAIRS,
    padding=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    pool=PAIRS,
)


def by_torch(
    window: Window, weight: Tensor, bias: Tensor | None, x: Tensor, *, relu: bool
) -> Tensor:
    """One client's, ``(B, C, H, W)``."""
    result = functional.conv2d(x, weight, bias, window.stride, window.padding)
    if window.pool != (1, 1):
        result = functional.max_pool2d(result, window.pool)
    return torch.relu(result) if relu else result


def error(found: Tensor, expected: Tensor) -> float:
    """The largest, in parts of the largest number expected."""
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-30))


@settings(max_examples=120, deadline=None)
@given(
    window=st.one_of(TILED, ANY),
    size=st.tuples(st.integers(3, 11), st.integers(3, 11)),
    channels=st.sampled_from([1, 3, 8, 20]),
    outs=st.sampled_from([1, 8, 19]),
    relu=st.booleans(),
    biased=st.booleans(),
    apart=st.booleans(),
    tiles=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_forth_and_back(
    window: Window,
    size: tuple[int, int],
    channels: int,
    outs: int,
    relu: bool,
    biased: bool,
    apart: bool,
    tiles: bool,
    seed: int,
) -> None:
    if min(window.cells(*size)) < 1:
        return
    rng = torch.Generator().manual_seed(seed)
    clients, batch = 2, 3
    x = torch.randn((clients, batch, channels, *size), generator=rng)
    start = {"w": torch.randn((outs, channels, *window.kernel), generator=rng)}
    if biased:
        start["b"] = torch.randn(outs, generator=rng)
    layer = Conv("w", "b" if biased else None, window)
    chain = find_chain(
        nn.Conv2d(channels, outs, window.kernel, window.stride, window.padding), x[0]
    )
    assert chain is not None
    (conv,) = chain.layers
    memory = stacked(chain, {conv.weight: start["w"]}, clients)[conv.weight]
    memory += 0.1 * torch.randn(memory.shape, generator=rng)  # each its own
    weights = {"w": memory}
    if biased:
        weights["b"] = torch.stack([start["b"], -start["b"]])
    found, undo = convolution(layer, relu=relu, first=False, apart=apart, tiles=tiles)(weights, x)
    slopes = torch.randn(found.shape, generator=rng)
    of_x, part = undo(slopes)
    for client in range(clients):
        leaves = [weights[name][client].double().requires_grad_() for name in weights]
        image = x[client].double().requires_grad_()
        expected = by_torch(window, leaves[0], leaves[1] if biased else None, image, relu=relu)
        assert error(found[client], expected.detach()) < 1e-5
        back = torch.autograd.grad([expected], [image, *leaves], [slopes[client].double()])
        assert error(of_x[client], back[0]) < 1e-5
        if isinstance(part, Made):
            weight, bias = part.weight[client], part.bias[client]
        else:
            rows, products, results = (one[client].flatten(0, 1) for one in part)
            weight, bias = products.t() @ rows, results.sum(0)
        matrix = back[1].permute(0, 2, 3, 1).flatten(1)
        assert error(weight, matrix) < 1e-5
        if biased:
            assert error(bias, back[2]) < 1e-5
    assert isinstance(part, Made) == (not apart)


def test_images_of_more_tiles_than_there_is_room_for_go_in_blocks() -> None:
    torch.manual_seed(0)
    window = Window((3, 3), (1, 1), (1, 1), (2, 2))
    layer = Conv("w", None, window)
    x = torch.randn(2, 2, 16, 60, 44)
    assert 5 * LANE < 2 * 30 * 22 * 64
    assert LANE // (22 * 64) == 11  # rows of tiles in a block, which ends within an image
    chain = find_chain(nn.Conv2d(16, 64, 3, bias=False), x[0])
    assert chain is not None
    (conv,) = chain.layers
    weights = {"w": stacked(chain, {conv.weight: torch.randn(64, 16, 3, 3)}, 2)[conv.weight]}
    link = convolution(layer, relu=True, first=False, apart=False, tiles=True)
    found, undo = link(weights, x)
    slopes = torch.randn(found.shape)
    of_x, part = undo(slopes)
    by_rows = convolution(layer, relu=True, first=False, apart=False, tiles=False)
    expected, undo = by_rows(weights, x)
    of_rows, rows = undo(slopes)
    assert isinstance(part, Made)
    assert isinstance(rows, Made)
    assert error(found, expected) < 1e-5
    near = (of_x - of_rows).abs() < 1e-4  # but where two results are nearly one
    assert near.float().mean() > 0.999
    assert error(part.weight, rows.weight) < 1e-3
    assert error(part.bias, rows.bias) < 1e-5


@pytest.mark.parametrize("private", [False, True])
@pytest.mark.parametrize("channels", [2, 8])
@pytest.mark.parametrize("shape", [(1, 2, 1, 6, 6), (1, 2, 9, 6, 6), (1, 2, 8, 1, 6), (1, 2, 6)])
def test_images_that_the_layer_does_not_take_are_refused_and_nothing_is_overrun(
    shape: tuple[int, ...], channels: int, private: bool
) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(channels, 8, 3), nn.ReLU(), nn.MaxPool2d(2))
    chain = find_chain(net, torch.randn(2, channels, 6, 6))
    assert chain is not None
    run = by_kernels(chain, private=private, adaptive=False)
    assert run is not None
    weights = stacked(chain, {name: p.detach() for name, p in net.named_parameters()}, 1)
    assert run(weights, torch.randn(1, 2, channels, 6, 6))[0].shape == (1, 2, 8, 2, 2)
    with pytest.raises((RuntimeError, ValueError)):
        run(weights, torch.randn(*shape))
