"""A convolution with its pooling and ReLU is torch's, forth and back, whatever loops it takes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from fedcore.kernels.direct import direct
from fedcore.kernels.sparse_backward import compile_sparse_backward
from fedcore.kernels.window import ConvolutionWindow
from fedcore.kernels.winograd import LANE
from fedcore.training.per_example.chain import BatchGradients, Conv, PerExampleGradients, stacked
from fedcore.training.per_example.cpu import kernel_run
from fedcore.training.per_example.cpu_conv import convolution
from fedcore.training.per_example.graph import find_chain

PAIRS = st.tuples(st.integers(1, 3), st.integers(1, 3))
TILED = st.builds(
    ConvolutionWindow,
    kernel=st.just((3, 3)),
    stride=st.just((1, 1)),
    padding=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    pool=st.just((2, 2)),
)
ANY = st.builds(
    ConvolutionWindow,
    kernel=PAIRS,
    stride=PAIRS,
    padding=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    pool=PAIRS,
)


def by_torch(
    window: ConvolutionWindow, weight: Tensor, bias: Tensor | None, x: Tensor, *, relu: bool
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
    per_example=st.booleans(),
    first=st.booleans(),
    seed=st.integers(0, 10**6),
)
@example(  # whose gradients are not sparse, like one that a normalisation follows
    window=ConvolutionWindow((3, 3), (1, 1), (0, 0)),
    size=(7, 6),
    channels=8,
    outs=19,
    relu=False,
    biased=True,
    per_example=False,
    first=False,
    seed=0,
)
@example(
    window=ConvolutionWindow((3, 2), (2, 1), (1, 2)),
    size=(7, 6),
    channels=3,
    outs=8,
    relu=False,
    biased=False,
    per_example=False,
    first=False,
    seed=0,
)
def test_forth_and_back(
    window: ConvolutionWindow,
    size: tuple[int, int],
    channels: int,
    outs: int,
    relu: bool,
    biased: bool,
    per_example: bool,
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
    found, backward = convolution(layer, relu=relu, first=first, per_example=per_example)(
        weights, x
    )
    grads = whole(rng, *found.shape)
    of_x, part = backward(grads)
    for client in range(clients):
        leaves = [weights[name][client].double().requires_grad_() for name in weights]
        image = x[client].double().requires_grad_()
        expected = by_torch(window, leaves[0], leaves[1] if biased else None, image, relu=relu)
        assert torch.equal(found[client], expected.detach().float())
        of_leaves = torch.autograd.grad([expected], [image, *leaves], [grads[client].double()])
        back = [one.float() for one in of_leaves]
        assert first or torch.equal(of_x[client], back[0])
        if isinstance(part, BatchGradients):
            weight, bias = part.weight[client], part.bias[client]
        elif isinstance(part, PerExampleGradients):
            weight, bias = part.weight[client].sum(0), part.bias[client].sum(0)
            of_last = torch.autograd.grad(
                [by_torch(window, leaves[0], leaves[1] if biased else None, image[-1:], relu=relu)],
                leaves,
                [grads[client, -1:].double()],
            )
            last = of_last[0].float().permute(0, 2, 3, 1).flatten(1)
            assert torch.equal(part.weight[client, -1], last)
            assert not biased or torch.equal(part.bias[client, -1], of_last[1].float())
        else:
            rows, products, results = (one[client].flatten(0, 1) for one in part)
            weight, bias = products.t() @ rows, results.sum(0)
        matrix = back[1].permute(0, 2, 3, 1).flatten(1)
        assert torch.equal(weight, matrix)
        if biased:
            assert torch.equal(bias, back[2])
    assert isinstance(part, BatchGradients) == (not per_example)


def weights_of(layer: Conv, rng: torch.Generator, clients: int) -> dict[str, Tensor]:
    """Each client's own, in the memory that `stacked` gives them."""
    rows = whole(rng, clients, layer.outs, *layer.window.kernel, layer.channels)
    return {"w": rows.permute(0, 1, 4, 2, 3), "b": whole(rng, clients, layer.outs)}


LARGE = {  # window, height and width, channels, outs
    "more tiles than there is room for": (
        ConvolutionWindow((3, 3), (1, 1), (1, 1), (2, 2)),
        (60, 44),
        16,
        64,
    ),
    "a kernel of more places than registers": (
        ConvolutionWindow((5, 5), (1, 1), (2, 2), (2, 2)),
        (30, 44),
        16,
        8,
    ),
    "lines longer than the nearest cache": (
        ConvolutionWindow((3, 3), (1, 1), (1, 1)),
        (6, 700),
        8,
        8,
    ),
    "steps, and blocks that are not square": (
        ConvolutionWindow((7, 3), (2, 3), (3, 0), (3, 1)),
        (61, 83),
        24,
        16,
    ),
    "many images in a band": (ConvolutionWindow((2, 2), (1, 1), (0, 0), (2, 2)), (3, 3), 16, 32),
    "as many channels as a cache has lines": (
        ConvolutionWindow((3, 3), (1, 1), (1, 1)),
        (8, 8),
        256,
        16,
    ),
}


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("case", LARGE.values(), ids=LARGE)
def test_images_that_go_in_parts(
    case: tuple[ConvolutionWindow, tuple[int, int], int, int], relu: bool
) -> None:
    window, size, channels, outs = case
    rng = torch.Generator().manual_seed(0)
    layer = Conv("w", "b", window, channels, outs)
    assert compile_sparse_backward(replace(window, padding=(0, 0)), channels) is not None
    weights = weights_of(layer, rng, 2)
    x = whole(rng, 2, 9, channels, *size)
    found, backward = convolution(layer, relu=relu, first=False, per_example=False)(weights, x)
    grads = whole(rng, *found.shape)
    of_x, part = backward(grads)
    assert isinstance(part, BatchGradients)
    for client in range(2):
        leaves = [one[client].double().requires_grad_() for one in (x, *weights.values())]
        expected = by_torch(window, leaves[1], leaves[2], leaves[0], relu=relu)
        assert torch.equal(found[client], expected.detach().float())
        back = torch.autograd.grad([expected], leaves, [grads[client].double()])
        assert torch.equal(of_x[client], back[0].float())
        assert torch.equal(part.weight[client], back[1].permute(0, 2, 3, 1).flatten(1).float())
        assert torch.equal(part.bias[client], back[2].float())


def test_tiles_in_blocks_are_what_is_tested() -> None:
    assert LANE < 9 * 30 * 22 * 16
    assert (9 * 30) % (LANE // (22 * 16)) != 0  # a block that ends within an image


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("channels", [1, 8, 16])
def test_what_is_no_number_goes_where_torch_has_it(channels: int, first: bool, relu: bool) -> None:
    rng = torch.Generator().manual_seed(0)
    layer = Conv("w", "b", ConvolutionWindow((3, 3), (1, 1), (1, 1), (2, 2)), channels, 8)
    weights = weights_of(layer, rng, 1)
    x = whole(rng, 1, 3, channels, 8, 8)
    x[0, 1, 0, 3, 5] = float("nan")
    x[0, 2, 0, 0, 0] = float("inf")
    found, _ = convolution(layer, relu=relu, first=first, per_example=False)(weights, x)
    expected = by_torch(layer.window, weights["w"][0], weights["b"][0], x[0], relu=relu)
    finite = expected.isfinite()
    assert not finite.all()
    assert torch.equal(found[0].isfinite(), finite)
    assert torch.equal(found[0][finite], expected[finite])


@pytest.mark.parametrize(
    ("kernel", "pool", "channels", "outs"),
    [((3, 3), 2, 1, 12), ((9, 9), 2, 1, 16), ((3, 3), 8, 1, 16), ((5, 5), 1, 4, 16)],
    ids=["outputs that fill no vector", "a large kernel", "large blocks", "many channels"],
)
def test_a_first_convolution_that_would_be_long_code_goes_by_rows(
    kernel: tuple[int, int], pool: int, channels: int, outs: int
) -> None:
    assert direct(ConvolutionWindow(kernel, (1, 1), (0, 0), (pool, pool)), channels, outs) is None


def test_loops_are_compiled_once() -> None:
    window = ConvolutionWindow((3, 3), (1, 1), (0, 0), (2, 2))
    assert direct(window, 1, 32) is direct(window, 1, 32)
    assert compile_sparse_backward(window, 32) is compile_sparse_backward(window, 32)
    assert compile_sparse_backward(window, 12) is None  # channels that fill no vector
    assert compile_sparse_backward(ConvolutionWindow((9, 9), (1, 1), (0, 0)), 16) is None


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
    run = kernel_run(chain, per_example=private)
    assert run is not None
    weights = stacked(chain, {name: p.detach() for name, p in net.named_parameters()}, 1)
    assert run(weights, torch.randn(1, 2, channels, 6, 6))[0].shape == (1, 2, 8, 2, 2)
    with pytest.raises((RuntimeError, ValueError)):
        run(weights, torch.randn(*shape))
