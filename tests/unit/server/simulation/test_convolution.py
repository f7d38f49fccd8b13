"""A convolution with its pooling and ReLU is torch's, forth and back, whatever loops it takes."""

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


def whole(rng: torch.Generator, *shape: int) -> Tensor:
    """Few and whole numbers, whose sums are exact by any way, and of which many are equal."""
    return torch.randint(-3, 4, shape, generator=rng).float()


@settings(max_examples=120, deadline=None)
@given(
    window=st.one_of(TILED, ANY),
    size=st.tuples(st.integers(3, 11), st.integers(3, 11)),
    channels=st.sampled_from([1, 3, 8, 16, 20, 48]),
    outs=st.sampled_from([1, 8, 19, 32]),
    relu=st.booleans(),
    biased=st.booleans(),
    apart=st.booleans(),
    first=st.booleans(),
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
    first: bool,
    seed: int,
) -> None:
    if min(window.cells(*size)) < 1:
        return
    rng = torch.Generator().manual_seed(seed)
    clients, batch = 2, 3
    x = whole(rng, clients, batch, channels, *size)
    start = {"w": whole(rng, outs, channels, *window.kernel)}
    if biased:
        start["b"] = whole(rng, outs)
    layer = Conv("w", "b" if biased else None, window, channels, outs)
    chain = find_chain(
        nn.Conv2d(channels, outs, window.kernel, window.stride, window.padding), x[0]
    )
    assert chain is not None
    (conv,) = chain.layers
    memory = stacked(chain, {conv.weight: start["w"]}, clients)[conv.weight]
    memory += whole(rng, *memory.shape)  # each its own
    weights = {"w": memory}
    if biased:
        weights["b"] = torch.stack([start["b"], -start["b"]])
    found, undo = convolution(layer, relu=relu, first=first, apart=apart)(weights, x)
    slopes = whole(rng, *found.shape)
    of_x, part = undo(slopes)
    for client in range(clients):
        leaves = [weights[name][client].double().requires_grad_() for name in weights]
        image = x[client].double().requires_grad_()
        expected = by_torch(window, leaves[0], leaves[1] if biased else None, image, relu=relu)
        assert torch.equal(found[client], expected.detach().float())
        of_leaves = torch.autograd.grad([expected], [image, *leaves], [slopes[client].double()])
        back = [one.float() for one in of_leaves]
        assert first or torch.equal(of_x[client], back[0])
        if isinstance(part, Made):
            weight, bias = part.weight[client], part.bias[client]
        else:
            rows, products, results = (one[client].flatten(0, 1) for one in part)
            weight, bias = products.t() @ rows, results.sum(0)
        matrix = back[1].permute(0, 2, 3, 1).flatten(1)
        assert torch.equal(weight, matrix)
        if biased:
            assert torch.equal(bias, back[2])
    assert isinstance(part, Made) == (not apart)


def test_images_of_more_tiles_than_there_is_room_for_go_in_blocks() -> None:
    rng = torch.Generator().manual_seed(0)
    window = Window((3, 3), (1, 1), (1, 1), (2, 2))
    x = whole(rng, 2, 2, 16, 60, 44)
    assert LANE < 2 * 30 * 22 * 16
    assert LANE // (22 * 16) == 46  # rows of tiles in a block, which ends within an image
    of_one_kernel = whole(rng, 64, 16, 3, 3).permute(0, 2, 3, 1)
    weights = {"w": torch.stack([of_one_kernel, -of_one_kernel]).permute(0, 1, 4, 2, 3)}
    layer = Conv("w", None, window, 16, 64)
    found, _ = convolution(layer, relu=True, first=False, apart=False)(weights, x)
    for client in range(2):
        expected = by_torch(window, weights["w"][client], None, x[client], relu=True)
        assert torch.equal(found[client], expected)


@pytest.mark.parametrize("private", [False, True])
@pytest.mark.parametrize("channels", [2, 8, 300])
@pytest.mark.parametrize("shape", [(1, 2, 1, 6, 6), (1, 2, 9, 6, 6), (1, 2, 8, 1, 6), (1, 2, 6)])
def test_images_that_the_layer_does_not_take_are_refused_and_nothing_is_overrun(
    shape: tuple[int, ...], channels: int, private: bool
) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(channels, 8, 3), nn.ReLU(), nn.MaxPool2d(2))
    chain = find_chain(net, torch.randn(2, channels, 6, 6))
    assert chain is not None
    run = by_kernels(chain, private=private)
    assert run is not None
    weights = stacked(chain, {name: p.detach() for name, p in net.named_parameters()}, 1)
    assert run(weights, torch.randn(1, 2, channels, 6, 6))[0].shape == (1, 2, 8, 2, 2)
    with pytest.raises((RuntimeError, ValueError)):
        run(weights, torch.randn(*shape))
