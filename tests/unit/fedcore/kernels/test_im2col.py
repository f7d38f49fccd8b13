"""Compiled loops give what torch's own operations give, forth and back."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from fedcore.kernels.im2col import (
    Floats,
    blocks_of,
    col2im,
    conv_geometry,
    im2col_columns,
    im2col_rows,
    pool,
    unpool,
)
from fedcore.kernels.window import ConvolutionWindow

PAIRS = st.tuples(st.integers(1, 3), st.integers(1, 3))
WINDOWS = st.builds(
    ConvolutionWindow,
    kernel=PAIRS,
    stride=PAIRS,
    padding=st.tuples(st.integers(0, 4), st.integers(0, 4)),  # more than a kernel is wide, too
    pool=PAIRS,
)
SIZES = st.tuples(st.integers(4, 10), st.integers(4, 10))
INF, NAN = float("inf"), float("nan")


def numbers(seed: int, *shape: int) -> Tensor:
    """Few and whole, so that many are equal and sums are exact."""
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(-3, 4, shape, generator=rng).float()


def laid(images: Tensor, window: ConvolutionWindow) -> Tensor:
    """Rows by torch's own unfolding, ``(N, results, F)``, of ``(N, H, W, C)``."""
    count, height, width, channels = images.shape
    rows = functional.unfold(
        images.permute(0, 3, 1, 2), window.kernel, padding=window.padding, stride=window.stride
    )
    down, across = (
        (size + 2 * pad - kernel) // step + 1
        for size, pad, kernel, step in zip(
            (height, width), window.padding, window.kernel, window.stride, strict=True
        )
    )
    rows = rows.view(count, channels, math.prod(window.kernel), down, across)
    cells = window.cells(height, width)
    rows = rows[..., : cells[0] * window.pool[0], : cells[1] * window.pool[1]]
    return rows.permute(0, 3, 4, 2, 1).reshape(count, -1, channels * math.prod(window.kernel))


@settings(max_examples=150, deadline=None)
@given(window=WINDOWS, size=SIZES, channels=st.sampled_from([1, 3, 8, 17]), seed=st.integers(0, 9))
def test_rows_forth_and_back(
    window: ConvolutionWindow, size: tuple[int, int], channels: int, seed: int
) -> None:
    if min(window.cells(*size)) < 1:
        return
    images = numbers(seed, 2, *size, channels).requires_grad_()
    expected = laid(images, window)
    look = conv_geometry(window, *size, channels)
    flat = images.detach().view(-1).numpy()
    rows = torch.full(expected.shape, NAN)  # whatever lay there before
    im2col_rows(flat, rows.view(-1).numpy(), look)
    assert torch.equal(rows, expected)
    columns = torch.full(expected.transpose(1, 2).shape, NAN)
    im2col_columns(flat, columns.view(-1).numpy(), look)
    assert torch.equal(columns, expected.transpose(1, 2))
    grads = numbers(seed + 1, *expected.shape)
    (back,) = torch.autograd.grad([expected], [images], [grads])
    found = torch.full(images.shape, NAN)
    col2im(grads.view(-1).numpy(), found.view(-1).numpy(), look)
    assert torch.equal(found, back)


def pooled(
    products: Tensor, bias: Tensor, window: ConvolutionWindow, *, relu: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Results, with slopes of 1, 2, 3, ... those of the products and of each image's bias.

    Of products ``(N, down, across, out)``, one client an image.
    """
    count, down, across, outs = products.shape
    blocks = blocks_of(ConvolutionWindow((1, 1), (1, 1), (0, 0), window.pool), down, across)
    flat = products.detach().clone().view(-1, outs)
    found = torch.full((count, *blocks[:2], outs), NAN)
    places = torch.empty(found.shape, dtype=torch.uint8)
    grads = torch.arange(1.0, found.numel() + 1).view(found.shape)
    of_bias = torch.full((count, outs), NAN)

    def rows(tensor: Tensor) -> Floats:
        return tensor.view(-1, outs).numpy()

    pool(rows(flat), bias.detach().numpy(), rows(found), rows(places), blocks, relu)  # type: ignore[arg-type]
    unpool(rows(grads), rows(places), rows(flat), of_bias.numpy(), blocks)  # type: ignore[arg-type]
    return found, grads, flat.view(products.shape), of_bias


@settings(max_examples=100, deadline=None)
@given(
    block=PAIRS,
    cells=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    outs=st.sampled_from([1, 5, 8, 33]),
    relu=st.booleans(),
    seed=st.integers(0, 99),
)
def test_pooling_forth_and_back(
    block: tuple[int, int], cells: tuple[int, int], outs: int, relu: bool, seed: int
) -> None:
    size = cells[0] * block[0], cells[1] * block[1]
    products = numbers(seed, 3, *size, outs).requires_grad_()
    bias = numbers(seed + 1, 3, outs).requires_grad_()
    expected = functional.max_pool2d(products.permute(0, 3, 1, 2), block).permute(0, 2, 3, 1)
    expected = expected + bias[:, None, None]
    if relu:
        expected = torch.relu(expected)
    window = ConvolutionWindow((1, 1), (1, 1), (0, 0), block)
    found, grads, of_products, of_bias = pooled(products, bias, window, relu=relu)
    assert torch.equal(found, expected)
    back = torch.autograd.grad([expected], [products, bias], [grads])
    assert torch.equal(of_products, back[0])
    assert torch.equal(of_bias, back[1])


@pytest.mark.parametrize("pool_size", [(2, 2), (3, 2)])
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("where", range(6))
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_what_is_no_finite_number_comes_through_as_in_torch(
    pool_size: tuple[int, int], relu: bool, where: int, value: float
) -> None:
    down, across = pool_size
    products = numbers(where, 1, down, across, 9)
    products.view(-1, 9)[where % (down * across), ::2] = value
    bias = torch.zeros(1, 9)
    expected = products.amax(dim=(1, 2), keepdim=True)
    window = ConvolutionWindow((1, 1), (1, 1), (0, 0), pool_size)
    found, *_ = pooled(products, bias, window, relu=relu)
    expected = torch.relu(expected) if relu else expected
    assert torch.equal(found.nan_to_num(7.5), expected.nan_to_num(7.5))
    assert torch.equal(found.isnan(), expected.isnan())


def test_other_numbers_than_float32_are_refused() -> None:
    look = conv_geometry(ConvolutionWindow((1, 1), (1, 1), (0, 0)), 2, 2, 1)
    with pytest.raises(TypeError, match="No matching definition"):
        im2col_rows(np.zeros(4), np.zeros(4), look)  # type: ignore[arg-type]


MODULE = """
from fedcore.kernels.compiled import compiled

@compiled("float64(float64)", fastmath=set())
def twice(x):
    return 2 * x

print(twice(21.0), len(twice.signatures), twice._cache.cache_path)
"""


@pytest.mark.parametrize("kept", [True, False])
def test_where_nothing_can_be_kept_on_disk_loops_are_compiled_all_the_same(
    tmp_path: Path, kept: bool
) -> None:
    """A package that its user may not write to, and no home: as in many containers."""
    module = tmp_path / "module.py"
    module.write_text(MODULE)
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    environment.pop("NUMBA_CACHE_DIR", None)
    if not kept:
        (tmp_path / "__pycache__").touch()  # a file, in the way of root, too
        environment |= {"HOME": "/dev/null", "XDG_CACHE_HOME": "/dev/null"}
    done = subprocess.run(
        [sys.executable, str(module)], env=environment, capture_output=True, text=True, check=False
    )
    folder = str(tmp_path / "__pycache__") if kept else "None"
    assert done.stdout.split() == ["42.0", "1", folder], done.stderr
