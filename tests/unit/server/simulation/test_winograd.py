"""Compiled loops of tiles are what the paper's matrices say, and each way back its transpose."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from server.simulation.winograd import (
    LANE,
    MOST,
    PARTS,
    Tiling,
    from_kernels,
    from_tiles,
    pool_tiles,
    to_kernels,
    to_tiles,
    unpool_tiles,
)

# Lavin and Gray 2016, section 4.1.
B = torch.tensor([[1.0, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, 1, 0, -1]]).t()
G = torch.tensor([[1.0, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]])
A = torch.tensor([[1.0, 1, 1, 0], [0, 1, -1, -1]]).t()
NAN = float("nan")


def whole(seed: int, *shape: int) -> Tensor:
    """Few and whole numbers, whose sums and halves are exact."""
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(-8, 9, shape, generator=rng).float()


def parts(lanes: Tensor, tiles: int, channels: int) -> Tensor:
    return lanes.as_strided((PARTS, tiles, channels), (LANE, channels, 1))


def turned(left: Tensor, numbers: Tensor) -> Tensor:
    """``left^T numbers left`` of ``(..., n, n, C)``, as ``(..., m * m, C)``."""
    found = torch.einsum("ai,...abc,bj->...ijc", left, numbers, left)
    return found.flatten(-3, -2)


def cut(images: Tensor, tiling: Tiling) -> Tensor:
    """Every tile of images ``(N, H, W, C)``: ``(N * down * across, 4, 4, C)``."""
    _, _, channels, down, across = tiling
    tiles = [
        images[:, 2 * y : 2 * y + 4, 2 * x : 2 * x + 4] for y in range(down) for x in range(across)
    ]
    return torch.stack(tiles, dim=1).reshape(-1, 4, 4, channels)


@settings(max_examples=60, deadline=None)
@given(
    down=st.integers(1, 4),
    across=st.integers(1, 4),
    more=st.integers(0, 1),
    channels=st.sampled_from([1, 7, 8, 33]),
    part=st.tuples(st.integers(0, 3), st.integers(1, 4)),
    seed=st.integers(0, 9),
)
def test_tiles_forth_and_back(
    down: int, across: int, more: int, channels: int, part: tuple[int, int], seed: int
) -> None:
    height, width = 2 * down + 2 + more, 2 * across + 2 + more  # a line that no tile needs
    tiling = (height, width, channels, down, across)
    images = whole(seed, 2, height, width, channels).requires_grad_()
    first, rows = min(part[0], 2 * down - 1), part[1]
    rows = min(rows, 2 * down - first)
    expected = turned(B, cut(images, tiling))[first * across : (first + rows) * across]
    lanes = torch.full((PARTS * LANE,), NAN)
    flat = images.detach().clone().view(-1).numpy()
    to_tiles(flat, lanes.numpy(), tiling, first, rows)
    found = parts(lanes, rows * across, channels)
    assert torch.equal(found.transpose(0, 1), expected)
    assert int(lanes.isfinite().sum()) == found.numel()  # and nothing else was written
    slopes = whole(seed + 1, PARTS, rows * across, channels)
    (back,) = torch.autograd.grad([expected], [images], [slopes.transpose(0, 1)])
    held = whole(seed + 2, *images.shape)
    sums = held.clone()
    from_tiles(slopes.numpy(), sums.view(-1).numpy(), tiling, first)
    assert torch.equal(sums, held + back)


@pytest.mark.parametrize("channels", [1, 8, 31, MOST])
def test_kernels_forth_and_back(channels: int) -> None:
    weights = (4 * whole(0, 2, 3, 9 * channels)).requires_grad_()
    expected = torch.einsum(
        "ia,konac,jn->koijc", *(G, weights.view(2, 3, 3, 3, channels).transpose(2, 3), G)
    ).flatten(2, 3)
    kernels = torch.full((2, PARTS, 3, channels), NAN)
    to_kernels(weights.detach().numpy(), kernels.numpy())
    assert torch.equal(kernels, expected.transpose(1, 2))
    slopes = 4 * whole(1, *kernels.shape)
    (back,) = torch.autograd.grad([expected], [weights], [slopes.transpose(1, 2)])
    found = torch.full(weights.shape, NAN)
    from_kernels(slopes.numpy(), found.numpy())
    assert torch.equal(found, back)


def pooled(products: Tensor, bias: Tensor, *, relu: bool) -> tuple[Tensor, Tensor]:
    """By `pool_tiles`, of ``(tiles, 16, out)``: what was found, and which of a tile it is."""
    tiles, _, outs = products.shape
    found = torch.full((tiles, outs), NAN)
    places = torch.empty((tiles, outs), dtype=torch.uint8)
    apart = products.transpose(0, 1).contiguous()
    pool_tiles(apart.numpy(), bias.numpy(), found.numpy(), places.numpy(), relu)
    return found, places


@settings(max_examples=60, deadline=None)
@given(
    tiles=st.integers(1, 5),
    outs=st.sampled_from([1, 8, 17]),
    relu=st.booleans(),
    seed=st.integers(0, 99),
)
def test_pooling_forth_and_back(tiles: int, outs: int, relu: bool, seed: int) -> None:
    products = whole(seed, tiles, 4, 4, outs).requires_grad_()
    bias = whole(seed + 1, outs).requires_grad_()
    results = turned(A, products)
    expected = torch.nn.functional.max_pool1d(results.transpose(1, 2), 4).squeeze(2) + bias
    expected = torch.relu(expected) if relu else expected
    found, places = pooled(products.detach().flatten(1, 2), bias.detach(), relu=relu)
    assert torch.equal(found, expected)
    slopes = torch.arange(1.0, found.numel() + 1).view(found.shape)
    back = torch.autograd.grad([expected], [products, bias], [slopes])
    lanes, of_bias = torch.full((PARTS * LANE,), NAN), torch.zeros(outs)
    unpool_tiles(slopes.numpy(), places.numpy(), lanes.numpy(), of_bias.numpy())
    assert torch.equal(parts(lanes, tiles, outs).transpose(0, 1), back[0].flatten(1, 2))
    assert torch.equal(of_bias, back[1])


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("part", range(PARTS))
def test_what_is_no_number_stays_none(part: int, relu: bool) -> None:
    products = whole(part, 3, PARTS, 9)
    products[1, part, 4] = NAN
    found, _ = pooled(products, torch.zeros(9), relu=relu)
    assert np.argwhere(found.isnan().numpy()).tolist() == [[1, 4]]
