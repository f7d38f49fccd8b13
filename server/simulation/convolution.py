"""One convolution of a chain with its pooling and ReLU, forth and back by compiled loops.

Clients go one after the other, so that what their images are spread out to stays in a core's cache:
between one layer and the next only what a layer gives is kept, and which of its results were taken.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from server.simulation.chain import Conv, Made, Share, Weights, matrix
from server.simulation.images import Window
from server.simulation.kernels import (
    blocks_of,
    fold_rows,
    lay_columns,
    lay_rows,
    look_of,
    pool,
    unpool,
)
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

Undo = Callable[[Tensor], tuple[Tensor, Share | Made | None]]
"""From slopes of what a link gave: those of what it was given, and its layer's part in them. To be
called once, and of a chain's first layer only its part counts."""
Link = Callable[[Weights, Tensor], tuple[Tensor, Undo]]
"""Runs a part of a chain: what it gives, and the way back."""

_SHORT = 16  # numbers: where a kernel's line has fewer, columns are laid quicker than rows
_FEW = 8  # channels: with fewer, tiles cost more than they save
_CHANNELS_LAST, _CHANNELS_FIRST = (0, 1, 3, 4, 2), (0, 1, 4, 2, 3)


def convolution(layer: Conv, *, relu: bool, first: bool, apart: bool, tiles: bool) -> Link:
    """Runs a convolution with its pooling.

    Args:
        layer: The convolution.
        relu: Whether one follows.
        first: Whether nobody asks for slopes of what it is given.
        apart: Whether its part on the way back is a `Share`, or else `Made`.
        tiles: Whether Winograd's tiles may be used, where ``apart`` is not asked for. Their errors
            are as small as other rounding, but a weight's gradient that is nought by all others'
            sums is not quite so by theirs.
    """

    def link(weights: Weights, x: Tensor) -> tuple[Tensor, Undo]:
        weight = matrix(layer, weights[layer.weight])
        outs = weight.shape[1]
        bias = x.new_zeros((len(x), outs)) if layer.bias is None else weights[layer.bias]
        x = x.permute(_CHANNELS_LAST).contiguous()
        layer.window.check(*x.shape[2:4])
        numbers = math.prod(layer.window.kernel) * x.shape[4]
        if weight.shape[2] != numbers:  # before a loop writes as much as other images would need
            raise ValueError(
                f"images of {x.shape[4]} channels: {numbers} numbers to each result, and the layer "
                f"takes {weight.shape[2]}"
            )
        if tiles and not apart and _tiled(layer.window, x, outs):
            return _by_tiles(layer.window, weight, bias, x, relu=relu, first=first)
        return _by_rows(layer.window, weight, bias, x, relu=relu, first=first, apart=apart)

    return link


def _by_rows(
    window: Window,
    weight: Tensor,
    bias: Tensor,
    x: Tensor,
    *,
    relu: bool,
    first: bool,
    apart: bool,
) -> tuple[Tensor, Undo]:
    """By a product of all that it looks at, each place in a row; ``x`` is ``(K, B, H, W, C)``."""
    clients, batch, height, width, channels = x.shape
    outs, numbers = weight.shape[1:]
    look = look_of(window, height, width, channels)
    blocks = blocks_of(window, height, width)
    count = look[-2] * look[-1]
    short = window.kernel[1] * channels < _SHORT
    rows = x.new_empty(
        (clients, batch, numbers, count) if short else (clients, batch, count, numbers)
    )
    lay = lay_columns if short else lay_rows
    images, of_rows = _flat(x), _flat(rows)
    rows = rows.transpose(2, 3) if short else rows
    products = x.new_empty((clients if apart else 1, batch, count, outs))
    of_products = _lines(products)
    result = x.new_empty((clients, batch, *blocks[:2], outs))
    found = _lines(result)
    places = torch.empty(found.shape, dtype=torch.uint8).numpy()
    for client in range(clients):
        place = client if apart else 0
        lay(images[client], of_rows[client], look)
        _multiply(rows[client], weight[client], products[place])
        one = found[client], places[client]
        pool(of_products[place], bias[client : client + 1].numpy(), *one, blocks, relu)

    def undo(slopes: Tensor) -> tuple[Tensor, Share | Made]:
        of_result = _lines(slopes.permute(_CHANNELS_LAST).contiguous())
        of_bias = slopes.new_empty((clients, batch, 1, outs))
        of_images = torch.empty_like(x)
        gradient = torch.empty_like(weight)
        for client in range(clients):
            place = client if apart else 0  # nobody reads the products again
            one = of_result[client], places[client], of_products[place]
            unpool(*one, _lines(of_bias)[client], blocks)
            if not apart:
                _multiply_back(rows[client], products[place], gradient[client])
            if not first:
                back = products[place].flatten(0, 1) @ weight[client]
                fold_rows(back.view(-1).numpy(), _flat(of_images)[client], look)
        part: Share | Made = (rows, products, of_bias)
        if not apart:
            part = Made(gradient, of_bias.sum(dim=(1, 2)))
        return of_images.permute(_CHANNELS_FIRST), part

    return result.permute(_CHANNELS_FIRST), undo


def _multiply(rows: Tensor, weight: Tensor, products: Tensor) -> None:
    """``(B, R, F)`` and ``(out, F)``: ``(B, R, out)``; one product, where rows are rows."""
    if rows.is_contiguous():
        torch.mm(rows.flatten(0, 1), weight.t(), out=products.flatten(0, 1))
    else:
        torch.bmm(rows, weight.t().expand(len(rows), -1, -1), out=products)


def _multiply_back(rows: Tensor, slopes: Tensor, gradient: Tensor) -> None:
    """``(B, R, F)`` and ``(B, R, out)``: ``(out, F)``."""
    if rows.is_contiguous():
        torch.mm(slopes.flatten(0, 1).t(), rows.flatten(0, 1), out=gradient)
    else:
        torch.sum(torch.bmm(rows.transpose(1, 2), slopes), dim=0, out=gradient.t())


def _tiled(window: Window, x: Tensor, outs: int) -> bool:
    """Whether tiles are the quicker way, and have room."""
    _, _, height, width, channels = x.shape
    fits = (window.kernel, window.stride, window.pool) == ((3, 3), (1, 1), (2, 2))
    across = window.cells(height, width)[1]
    wide = max(channels, outs)
    return fits and min(channels, outs) >= _FEW and wide <= MOST and across * wide <= LANE


def _by_tiles(
    window: Window, weight: Tensor, bias: Tensor, x: Tensor, *, relu: bool, first: bool
) -> tuple[Tensor, Undo]:
    """By Winograd's tiles, each of which is what pooling looks at."""
    clients, batch, height, width, channels = x.shape
    outs = weight.shape[1]
    down, across = window.cells(height, width)
    above, beside = window.padding
    if above or beside:
        x = functional.pad(x, (0, 0, beside, beside, above, above))
    tiling: Tiling = (x.shape[2], x.shape[3], channels, down, across)
    kernels = x.new_empty((clients, PARTS, outs, channels))
    to_kernels(weight.numpy(), kernels.numpy())
    result = x.new_empty((clients, batch, down, across, outs))
    images, found, biases = _flat(x), _lines(result), bias.numpy()
    places = torch.empty(found.shape, dtype=torch.uint8).numpy()
    blocks = _row_blocks(batch * down, LANE // (across * max(channels, outs)), across)
    lanes = x.new_empty(PARTS * LANE)
    for client in range(clients):
        for first_row, rows, taken in blocks:
            to_tiles(images[client], lanes.numpy(), tiling, first_row, rows)
            products = torch.bmm(
                _parts(lanes, rows * across, channels), kernels[client].transpose(1, 2)
            )
            one = found[client, taken], places[client, taken]
            pool_tiles(products.numpy(), biases[client], *one, relu)

    def undo(slopes: Tensor) -> tuple[Tensor, Made]:
        of_result = _lines(slopes.permute(_CHANNELS_LAST).contiguous())
        of_kernels = torch.empty_like(kernels)
        gradient = Made(torch.empty_like(weight), slopes.new_zeros((clients, outs)))
        of_images = torch.zeros_like(x)
        lanes, others = x.new_empty(PARTS * LANE), x.new_empty(PARTS * LANE)
        for client in range(clients):
            for first_row, rows, taken in blocks:
                one = of_result[client, taken], places[client, taken]
                unpool_tiles(*one, others.numpy(), gradient.bias[client].numpy())
                of_products = _parts(others, rows * across, outs)
                to_tiles(images[client], lanes.numpy(), tiling, first_row, rows)
                tiles = _parts(lanes, rows * across, channels)
                if first_row:
                    of_kernels[client].baddbmm_(of_products.transpose(1, 2), tiles)
                else:
                    torch.bmm(of_products.transpose(1, 2), tiles, out=of_kernels[client])
                if not first:
                    back = torch.bmm(of_products, kernels[client])
                    from_tiles(back.numpy(), _flat(of_images)[client], tiling, first_row)
        from_kernels(of_kernels.numpy(), gradient.weight.numpy())
        inside = of_images[:, :, above : above + height, beside : beside + width]
        return inside.permute(_CHANNELS_FIRST), gradient

    return result.permute(_CHANNELS_FIRST), undo


def _row_blocks(rows: int, most: int, across: int) -> list[tuple[int, int, slice]]:
    """Rows of tiles in blocks that have room: the first, how many, and their tiles."""
    blocks = []
    for first in range(0, rows, most):
        last = min(rows, first + most)
        blocks.append((first, last - first, slice(first * across, last * across)))
    return blocks


def _parts(lanes: Tensor, tiles: int, channels: int) -> Tensor:
    return lanes.as_strided((PARTS, tiles, channels), (LANE, channels, 1))


def _flat(tensor: Tensor) -> Any:
    """``(K, ...)`` with a line a client."""
    return tensor.view(len(tensor), -1).numpy()


def _lines(tensor: Tensor) -> Any:
    """``(K, ..., out)`` as ``(K, N, out)``."""
    return tensor.view(len(tensor), -1, tensor.shape[-1]).numpy()
