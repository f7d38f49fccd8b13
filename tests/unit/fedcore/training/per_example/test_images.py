"""Convolutions as products and pooling give what torch's own give, forth and back."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from fedcore.kernels.window import ConvolutionWindow
from fedcore.training.per_example.images import (
    input_gradient,
    largest,
    patches,
    with_input_gradient,
)

PAIRS = st.tuples(st.integers(1, 3), st.integers(1, 3))


def convolved(x: Tensor, weight: Tensor, window: ConvolutionWindow) -> Tensor:
    """As the chain does it, for one client: ``(1, B, P, out)``."""
    matrix = weight.permute(0, 2, 3, 1).flatten(1).unsqueeze(0)
    rows = patches(x.detach(), window)
    z = torch.matmul(rows, matrix.transpose(1, 2))
    z = with_input_gradient(x, z, matrix, window)
    return largest(z.view(*z.shape[:2], math.prod(window.pool), -1, z.shape[3]), 2)


@settings(max_examples=120, deadline=None)
@given(
    kernel=PAIRS,
    stride=PAIRS,
    padding=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    pool=PAIRS,
    size=st.tuples(st.integers(6, 12), st.integers(6, 12)),
    channels=st.sampled_from([1, 3, 7, 8, 12]),
    seed=st.integers(0, 9),
)
def test_any_rectangle(
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    pool: tuple[int, int],
    size: tuple[int, int],
    channels: int,
    seed: int,
) -> None:
    window = ConvolutionWindow(kernel, stride, padding, pool)
    if min(window.cells(*size)) < 1:
        return
    rng = torch.Generator().manual_seed(seed)
    double = {"generator": rng, "dtype": torch.float64}
    x = torch.randn(2, channels, *size, **double).requires_grad_()  # type: ignore[call-overload]
    weight = torch.randn(5, channels, *kernel, **double)  # type: ignore[call-overload]
    expected = functional.conv2d(x, weight, stride=stride, padding=padding)
    expected = functional.max_pool2d(expected, pool)
    found = convolved(x.unsqueeze(0), weight, window)[0]
    as_image = found.transpose(1, 2).reshape(2, 5, *window.cells(*size))
    assert torch.allclose(as_image, expected, atol=1e-10)
    grads = torch.randn(expected.shape, **double)  # type: ignore[call-overload]
    (way_back,) = torch.autograd.grad([expected], [x], [grads])
    (ours,) = torch.autograd.grad([as_image], [x], [grads])
    assert torch.allclose(ours, way_back, atol=1e-10)


@pytest.mark.parametrize(
    "values",
    [(1.0, 1.0, 1.0, 1.0), (0.0, 2.0, 2.0, 1.0), (3.0, 1.0, 3.0, 3.0), (0.0, 1e-37, 0.0, 1e-37)],
)
def test_of_several_largest_the_first_gets_the_slope(values: tuple[float, ...]) -> None:
    block = torch.tensor(values).view(1, 1, 2, 2).requires_grad_()
    (expected,) = torch.autograd.grad([functional.max_pool2d(block, 2).sum()], [block])
    z = torch.tensor(values).view(4, 1).requires_grad_()
    (found,) = torch.autograd.grad([largest(z, 0).sum()], [z])
    assert torch.equal(found.view(2, 2), expected.view(2, 2))


def test_what_no_whole_block_covers_is_not_looked_at() -> None:
    x = torch.randn(1, 2, 8, 13, 13)
    assert patches(x, ConvolutionWindow((3, 3), (1, 1), (0, 0), (2, 2))).shape == (1, 2, 4 * 25, 72)


def test_clients_at_once_or_one_by_one_are_the_same() -> None:
    window, shape = ConvolutionWindow((3, 2), (2, 1), (1, 0), (1, 2)), (3, 2, 4, 7, 6)
    rng = torch.Generator().manual_seed(0)
    down, across = window.cells(7, 6)
    grads = torch.randn(3, 2, 2 * down * across, 5, generator=rng)
    weight = torch.randn(3, 5, 6 * 4, generator=rng)
    one_by_one = input_gradient(grads, weight, window, shape, 1)
    assert one_by_one.shape == shape
    assert torch.allclose(input_gradient(grads, weight, window, shape, 3), one_by_one, atol=1e-5)


def test_images_too_small_for_a_kernel_and_its_pooling_are_refused() -> None:
    window = ConvolutionWindow((3, 3), (1, 1), (0, 0), (2, 2))
    window.check(4, 4)
    for height, width in ((0, 48), (48, 0)):  # of which wide padding would leave something
        with pytest.raises(ValueError, match=f"images of {height} x {width} are too small"):
            ConvolutionWindow((2, 2), (1, 1), (1, 1)).check(height, width)
    with pytest.raises(ValueError, match="images of 4 x 3 are too small"):
        window.check(4, 3)
