"""One convolution of a chain with its pooling and ReLU, forth and back by compiled loops.

Clients go one after the other, so that what their images are spread out to stays in a core's cache:
between one layer and the next only what a layer gives is kept, and which of its results were taken.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fedcore.kernels.direct import Direct, direct
from fedcore.kernels.im2col import (
    blocks_of,
    fold_rows,
    lay_columns,
    lay_rows,
    look_of,
    pool,
    unpool,
)
from fedcore.kernels.sparse_backward import Back, taken_back
from fedcore.kernels.window import ConvolutionWindow
from fedcore.kernels.winograd import LANE, MOST, PARTS, Tiling, pool_tiles, to_kernels, to_tiles
from fedcore.training.per_example.chain import Conv, Each, Made, Share, Weights, matrix

Undo = Callable[[Tensor], tuple[Tensor, Share | Made | Each | None]]
"""From slopes of what a link gave: those of what it was given, and its layer's part in them. To be
called once, and of a chain's first layer only its part counts."""
Link = Callable[[Weights, Tensor], tuple[Tensor, Undo]]
"""Runs a part of a chain: what it gives, and the way back."""

_SHORT = 16  # numbers: where a kernel's line has fewer, columns are laid quicker than rows
_FEW = 8  # channels: with fewer, tiles cost more than they save
_CHANNELS_LAST, _CHANNELS_FIRST = (0, 1, 3, 4, 2), (0, 1, 4, 2, 3)


def convolution(layer: Conv, *, relu: bool, first: bool, apart: bool) -> Link:
    """Runs a convolution with its pooling.

    Args:
        layer: The convolution.
        relu: Whether one follows.
        first: Whether nobody asks for slopes of what it is given.
        apart: Whether examples are left apart on the way back, or else its part is `Made`.
    """
    inside = replace(layer.window, padding=(0, 0))
    loops = direct(inside, layer.channels, layer.outs) if first else None
    back = None if first else taken_back(inside, layer.channels)

    def link(weights: Weights, x: Tensor) -> tuple[Tensor, Undo]:
        weight = matrix(layer, weights[layer.weight])
        bias = x.new_zeros((len(x), layer.outs)) if layer.bias is None else weights[layer.bias]
        x = x.permute(_CHANNELS_LAST)
        layer.window.check(*x.shape[2:4])
        if x.shape[4] != layer.channels:  # before a loop reads or writes what other images need
            raise ValueError(
                f"images of {x.shape[4]} channels, and the layer takes {layer.channels}"
            )
        if loops is not None:
            return _directly(loops, layer.window, weight, bias, x, relu=relu, apart=apart)
        if back is not None:
            return _by_taken(back, layer.window, weight, bias, x, relu=relu, apart=apart)
        return _by_rows(layer.window, weight, bias, x, relu=relu, first=first, apart=apart)

    return link


def _padded(window: ConvolutionWindow, x: Tensor) -> Tensor:
    """``(K, B, H, W, C)`` in one run of memory."""
    down, across = window.padding
    if down or across:
        x = functional.pad(x, (0, 0, across, across, down, down))
    return x.contiguous()


def _directly(
    loops: Direct,
    window: ConvolutionWindow,
    weight: Tensor,
    bias: Tensor,
    x: Tensor,
    *,
    relu: bool,
    apart: bool,
) -> tuple[Tensor, Undo]:
    """By loops that read images as they are; ``x`` is ``(K, B, H, W, C)``, as below."""
    cells = window.cells(*x.shape[2:4])
    x = _padded(window, x)
    size = (x.shape[2], x.shape[3], *cells)
    result = x.new_empty((*x.shape[:2], *cells, weight.shape[1]))
    kernels = weight.transpose(1, 2).contiguous()  # an output beside the other
    images, found = _flat(x), _lines(result)
    places = torch.empty(found.shape, dtype=torch.uint8).numpy()
    loops.ahead(images, kernels.numpy(), bias.numpy(), found, places, size, relu)

    def undo(slopes: Tensor) -> tuple[Tensor, Made | Each]:
        each = slopes.shape[:2] if apart else slopes.shape[:1]
        of_result = slopes.permute(_CHANNELS_LAST).contiguous()
        of_kernels = kernels.new_empty((*each, *kernels.shape[1:]))
        of_bias = bias.new_empty((*each, *bias.shape[1:]))
        parts = math.prod(each)  # of what a gradient is asked for
        loops.back(
            images.reshape(parts, -1),
            of_kernels.view(parts, *kernels.shape[1:]).numpy(),
            of_bias.view(parts, -1).numpy(),
            of_result.view(parts, -1, of_result.shape[4]).numpy(),
            places.reshape(parts, -1, places.shape[2]),
            size,
        )
        return slopes, (Each if apart else Made)(of_kernels.transpose(-1, -2), of_bias)

    return result.permute(_CHANNELS_FIRST), undo


def _by_taken(
    back: Back,
    window: ConvolutionWindow,
    weight: Tensor,
    bias: Tensor,
    x: Tensor,
    *,
    relu: bool,
    apart: bool,
) -> tuple[Tensor, Undo]:
    """Forth by the fewest products, back from the results that were taken."""
    (height, width), (above, beside) = x.shape[2:4], window.padding
    cells = window.cells(height, width)
    x = _padded(window, x)
    inside = replace(window, padding=(0, 0))
    if _tiled(inside, x, weight.shape[1]):
        result, places = _tiles_ahead(inside, weight, bias, x, relu=relu)
    else:
        result, places, _, _ = _rows_ahead(inside, weight, bias, x, relu=relu, keep=False)

    def undo(slopes: Tensor) -> tuple[Tensor, Made | Each]:
        each = slopes.shape[:2] if apart else slopes.shape[:1]
        of_weight = weight.new_empty((*each, *weight.shape[1:]))
        of_bias = bias.new_empty((*each, *bias.shape[1:]))
        of_images = torch.empty_like(x)
        parts = math.prod(each)  # of what a gradient is asked for
        back(
            x.view(parts, -1).numpy(),
            of_images.view(parts, -1).numpy(),
            weight.numpy(),
            of_weight.view(parts, *weight.shape[1:]).numpy(),
            of_bias.view(parts, -1).numpy(),
            slopes.contiguous().view(parts, -1, *slopes.shape[2:]).numpy(),
            places.reshape(parts, -1, places.shape[2]),
            (x.shape[2], x.shape[3], *cells),
        )
        found = of_images[:, :, above : above + height, beside : beside + width]
        return found.permute(_CHANNELS_FIRST), (Each if apart else Made)(of_weight, of_bias)

    return result.permute(_CHANNELS_FIRST), undo


def _by_rows(
    window: ConvolutionWindow,
    weight: Tensor,
    bias: Tensor,
    x: Tensor,
    *,
    relu: bool,
    first: bool,
    apart: bool,
) -> tuple[Tensor, Undo]:
    """By products of rows, forth and back."""
    x = x.contiguous()
    clients, batch, height, width, channels = x.shape
    outs = weight.shape[1]
    look = look_of(window, height, width, channels)
    blocks = blocks_of(window, height, width)
    result, places, rows, products = _rows_ahead(
        window, weight, bias, x, relu=relu, keep=True, apart=apart
    )
    of_products = _lines(products)

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


def _rows_ahead(
    window: ConvolutionWindow,
    weight: Tensor,
    bias: Tensor,
    x: Tensor,
    *,
    relu: bool,
    keep: bool,
    apart: bool = False,
) -> tuple[Tensor, Any, Tensor, Tensor]:
    """By a product of all that it looks at, each place in a row.

    Args:
        window: Of the convolution.
        weight: ``(K, out, F)``.
        bias: ``(K, out)``.
        x: ``(K, B, H, W, C)``, in one run of memory.
        relu: Whether one follows.
        keep: Whether somebody reads the rows again, or else there is room for one client's.
        apart: The same of products.

    Returns:
        What is found, its places, rows and products.
    """
    clients, batch, height, width, channels = x.shape
    outs, numbers = weight.shape[1:]
    look = look_of(window, height, width, channels)
    blocks = blocks_of(window, height, width)
    count = look[-2] * look[-1]
    short = window.kernel[1] * channels < _SHORT
    kept = clients if keep else 1
    rows = x.new_empty((kept, batch, numbers, count) if short else (kept, batch, count, numbers))
    lay = lay_columns if short else lay_rows
    images, of_rows = _flat(x), _flat(rows)
    rows = rows.transpose(2, 3) if short else rows
    products = x.new_empty((clients if apart else 1, batch, count, outs))
    result = x.new_empty((clients, batch, *blocks[:2], outs))
    found = _lines(result)
    places = torch.empty(found.shape, dtype=torch.uint8).numpy()
    for client in range(clients):
        at, to = client if keep else 0, client if apart else 0
        lay(images[client], of_rows[at], look)
        _multiply(rows[at], weight[client], products[to])
        one = found[client], places[client]
        pool(_lines(products)[to], bias[client : client + 1].numpy(), *one, blocks, relu)
    return result, places, rows, products


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


def _tiled(window: ConvolutionWindow, x: Tensor, outs: int) -> bool:
    """Whether tiles are the quicker way, and have room."""
    _, _, height, width, channels = x.shape
    fits = (window.kernel, window.stride, window.pool) == ((3, 3), (1, 1), (2, 2))
    across = window.cells(height, width)[1]
    wide = max(channels, outs)
    return fits and min(channels, outs) >= _FEW and wide <= MOST and across * channels <= LANE


def _tiles_ahead(
    window: ConvolutionWindow, weight: Tensor, bias: Tensor, x: Tensor, *, relu: bool
) -> tuple[Tensor, Any]:
    """By Winograd's tiles, each of which is what pooling looks at: what is found, its places."""
    clients, batch, height, width, channels = x.shape
    outs = weight.shape[1]
    down, across = window.cells(height, width)
    tiling: Tiling = (height, width, channels, down, across)
    kernels = x.new_empty((clients, PARTS, outs, channels))
    to_kernels(weight.numpy(), kernels.numpy())
    result = x.new_empty((clients, batch, down, across, outs))
    images, found, biases = _flat(x), _lines(result), bias.numpy()
    places = torch.empty(found.shape, dtype=torch.uint8).numpy()
    lanes = x.new_empty(PARTS * LANE)
    most = min(batch * down, LANE // (across * channels))  # rows of tiles at once
    products = x.new_empty(PARTS * most * across * outs)
    for client, kernel in enumerate(kernels.transpose(2, 3)):
        for first, rows, taken in _row_blocks(batch * down, most, across):
            to_tiles(images[client], lanes.numpy(), tiling, first, rows)
            parts = lanes.as_strided((PARTS, rows * across, channels), (LANE, channels, 1))
            room = products[: PARTS * rows * across * outs].view(PARTS, rows * across, outs)
            torch.bmm(parts, kernel, out=room)
            one = found[client, taken], places[client, taken]
            pool_tiles(room.numpy(), biases[client], *one, relu)
    return result, places


def _row_blocks(rows: int, most: int, across: int) -> list[tuple[int, int, slice]]:
    """Rows of tiles in blocks that have room: the first, how many, and their tiles."""
    blocks = []
    for first in range(0, rows, most):
        last = min(rows, first + most)
        blocks.append((first, last - first, slice(first * across, last * across)))
    return blocks


def _flat(tensor: Tensor) -> Any:
    """``(K, ...)`` with a line a client."""
    return tensor.view(len(tensor), -1).numpy()


def _lines(tensor: Tensor) -> Any:
    """``(K, ..., out)`` as ``(K, N, out)``."""
    return tensor.view(len(tensor), -1, tensor.shape[-1]).numpy()
