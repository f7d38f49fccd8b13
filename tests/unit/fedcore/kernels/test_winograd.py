"""Compiled loops of tiles are what the paper's matrices say."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedcore.kernels.im2col import OFF
from fedcore.kernels.winograd import (
    LANE,
    MAX_CHANNELS,
    PARTS,
    Tiling,
    pool_tiles,
    to_kernels,
    to_tiles,
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
def test_tiles(
    down: int, across: int, more: int, channels: int, part: tuple[int, int], seed: int
) -> None:
    height, width = 2 * down + 2 + more, 2 * across + 2 + more  # a line that no tile needs
    tiling = (height, width, channels, down, across)
    images = whole(seed, 2, height, width, channels)
    first, rows = min(part[0], 2 * down - 1), part[1]
    rows = min(rows, 2 * down - first)
    expected = turned(B, cut(images, tiling))[first * across : (first + rows) * across]
    lanes = torch.full((PARTS * LANE,), NAN)
    to_tiles(images.view(-1).numpy(), lanes.numpy(), tiling, first, rows)
    found = parts(lanes, rows * across, channels)
    assert torch.equal(found.transpose(0, 1), expected)
    assert int(lanes.isfinite().sum()) == found.numel()  # and nothing else was written


@pytest.mark.parametrize("channels", [1, 8, 31, MAX_CHANNELS])
def test_kernels(channels: int) -> None:
    weights = 4 * whole(0, 2, 3, 9 * channels)
    expected = torch.einsum(
        "ia,konac,jn->koijc", *(G, weights.view(2, 3, 3, 3, channels).transpose(2, 3), G)
    ).flatten(2, 3)
    kernels = torch.full((2, PARTS, 3, channels), NAN)
    to_kernels(weights.numpy(), kernels.numpy())
    assert torch.equal(kernels, expected.transpose(1, 2))


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
def test_pooling(tiles: int, outs: int, relu: bool, seed: int) -> None:
    products = whole(seed, tiles, 4, 4, outs)
    bias = whole(seed + 1, outs)
    largest, which = turned(A, products).max(dim=1)
    expected = torch.relu(largest + bias) if relu else largest + bias
    found, places = pooled(products.flatten(1, 2), bias, relu=relu)
    assert torch.equal(found, expected)
    taken = places != OFF
    assert torch.equal(places[taken], which[taken].to(torch.uint8))
    assert torch.equal(taken, expected > 0 if relu else torch.ones_like(taken))


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("part", range(PARTS))
def test_what_is_no_number_stays_none(part: int, relu: bool) -> None:
    products = whole(part, 3, PARTS, 9)
    products[1, part, 4] = NAN
    found, _ = pooled(products, torch.zeros(9), relu=relu)
    assert np.argwhere(found.isnan().numpy()).tolist() == [[1, 4]]
