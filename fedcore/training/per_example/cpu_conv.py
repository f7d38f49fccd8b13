"""Runs a convolution with its pooling and ReLU, forward and backward, by compiled loops.

Clients run one after the other, so that each one's patches stay in a core's cache. Between layers
only each layer's results are kept, and the position of the maximum in each pooling block.

Shapes: ``K`` clients, ``B`` examples, ``R`` patches per example of ``F`` numbers each.
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
    col2im,
    conv_geometry,
    im2col_columns,
    im2col_rows,
    pool,
    unpool,
)
from fedcore.kernels.sparse_backward import Back, compile_sparse_backward
from fedcore.kernels.window import ConvolutionWindow
from fedcore.kernels.winograd import (
    LANE,
    MAX_CHANNELS,
    PARTS,
    Tiling,
    pool_tiles,
    to_kernels,
    to_tiles,
)
from fedcore.training.per_example.chain import (
    BatchGradients,
    Conv,
    PerExampleGradients,
    Share,
    Weights,
    matrix,
)

Backward = Callable[[Tensor], tuple[Tensor, Share | BatchGradients | PerExampleGradients | None]]
"""Maps gradients of a link's result to those of its input, and to the layer's part. Call it only
once; for a chain's first layer only the part is valid."""
Link = Callable[[Weights, Tensor], tuple[Tensor, Backward]]
"""Runs one part of a chain; returns its result and its backward pass."""

_SHORT = 16  # numbers per kernel row; with fewer, filling columns is faster than filling rows
_FEW = 8  # channels; with fewer, tiles cost more than they save
_CHANNELS_LAST, _CHANNELS_FIRST = (0, 1, 3, 4, 2), (0, 1, 4, 2, 3)


def convolution(layer: Conv, *, relu: bool, first: bool, per_example: bool) -> Link:
    """Returns a link that runs a convolution with its pooling.

    Args:
        layer: The convolution.
        relu: Whether a ReLU follows.
        first: Whether it is the chain's first layer, whose input needs no gradients.
        per_example: Whether the backward pass keeps examples separate.
    """
    inside = replace(layer.window, padding=(0, 0))
    loops = direct(inside, layer.channels, layer.outs) if first else None
    dense = not relu and inside.pool == (1, 1)  # few of its gradients are zero
    back = None if first or dense else compile_sparse_backward(inside, layer.channels)

    def link(weights: Weights, x: Tensor) -> tuple[Tensor, Backward]:
        weight = matrix(layer, weights[layer.weight])
        bias = x.new_zeros((len(x), layer.outs)) if layer.bias is None else weights[layer.bias]
        x = x.permute(_CHANNELS_LAST)
        layer.window.check(*x.shape[2:4])
        if x.shape[4] != layer.channels:  # before a loop reads or writes out of bounds
            raise ValueError(
                f"images of {x.shape[4]} channels, but the layer takes {layer.channels}"
            )
        if loops is not None:
            return _directly(
                loops, layer.window, weight, bias, x, relu=relu, per_example=per_example
            )
        if back is not None:
            return _sparsely(
                back, layer.window, weight, bias, x, relu=relu, per_example=per_example
            )
        if dense and not first and not per_example:
            return _in_turn(layer.window, weight, bias, x)
        return _by_rows(
            layer.window, weight, bias, x, relu=relu, first=first, per_example=per_example
        )

    return link


def _padded(window: ConvolutionWindow, x: Tensor) -> Tensor:
    """Pads ``(K, B, H, W, C)`` and makes it contiguous."""
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
    per_example: bool,
) -> tuple[Tensor, Backward]:
    """Runs ``x``, ``(K, B, H, W, C)``, by loops that read images directly, without patches."""
    cells = window.cells(*x.shape[2:4])
    x = _padded(window, x)
    size = (x.shape[2], x.shape[3], *cells)
    result = x.new_empty((*x.shape[:2], *cells, weight.shape[1]))
    kernels = weight.transpose(1, 2).contiguous()  # outputs adjacent in memory
    images, found = _flat(x), _lines(result)
    places = torch.empty(found.shape, dtype=torch.uint8).numpy()
    loops.forward(images, kernels.numpy(), bias.numpy(), found, places, size, relu)

    def backward(grads: Tensor) -> tuple[Tensor, BatchGradients | PerExampleGradients]:
        each = grads.shape[:2] if per_example else grads.shape[:1]
        of_result = grads.permute(_CHANNELS_LAST).contiguous()
        of_kernels = kernels.new_empty((*each, *kernels.shape[1:]))
        of_bias = bias.new_empty((*each, *bias.shape[1:]))
        parts = math.prod(each)  # number of gradients
        loops.backward(
            images.reshape(parts, -1),
            of_kernels.view(parts, *kernels.shape[1:]).numpy(),
            of_bias.view(parts, -1).numpy(),
            of_result.view(parts, -1, of_result.shape[4]).numpy(),
            places.reshape(parts, -1, places.shape[2]),
            size,
        )
        return grads, (PerExampleGradients if per_example else BatchGradients)(
            of_kernels.transpose(-1, -2), of_bias
        )

    return result.permute(_CHANNELS_FIRST), backward


def _sparsely(
    back: Back,
    window: ConvolutionWindow,
    weight: Tensor,
    bias: Tensor,
    x: Tensor,
    *,
    relu: bool,
    per_example: bool,
) -> tuple[Tensor, Backward]:
    """Runs ``x``, ``(K, B, H, W, C)``, with a backward pass only through each block's maximum.

    The forward pass uses Winograd tiles where these are faster, and patches elsewhere.
    """
    (height, width), (above, beside) = x.shape[2:4], window.padding
    cells = window.cells(height, width)
    x = _padded(window, x)
    inside = replace(window, padding=(0, 0))
    if _tiled(inside, x, weight.shape[1]):
        result, places = _tiles_forward(inside, weight, bias, x, relu=relu)
    else:
        result, places, _, _ = _rows_forward(inside, weight, bias, x, relu=relu, keep=False)

    def backward(grads: Tensor) -> tuple[Tensor, BatchGradients | PerExampleGradients]:
        each = grads.shape[:2] if per_example else grads.shape[:1]
        of_weight = weight.new_empty((*each, *weight.shape[1:]))
        of_bias = bias.new_empty((*each, *bias.shape[1:]))
        of_images = torch.empty_like(x)
        parts = math.prod(each)  # number of gradients
        back(
            x.view(parts, -1).numpy(),
            of_images.view(parts, -1).numpy(),
            weight.numpy(),
            of_weight.view(parts, *weight.shape[1:]).numpy(),
            of_bias.view(parts, -1).numpy(),
            grads.contiguous().view(parts, -1, *grads.shape[2:]).numpy(),
            places.reshape(parts, -1, places.shape[2]),
            (x.shape[2], x.shape[3], *cells),
        )
        found = of_images[:, :, above : above + height, beside : beside + width]
        return found.permute(_CHANNELS_FIRST), (
            PerExampleGradients if per_example else BatchGradients
        )(of_weight, of_bias)

    return result.permute(_CHANNELS_FIRST), backward


def _in_turn(
    window: ConvolutionWindow, weight: Tensor, bias: Tensor, x: Tensor
) -> tuple[Tensor, Backward]:
    """Runs ``x``, ``(K, B, H, W, C)``, by matrix products, without pooling or ReLU.

    Clients share one buffer of patches, which stays in a core's cache. Laying patches out again for
    the backward pass takes less time than reading them from outside it.
    """
    x = x.contiguous()
    (clients, batch, height, width, channels), (outs, numbers) = x.shape, weight.shape[1:]
    geometry = conv_geometry(window, height, width, channels)
    images, cells = _flat(x), window.cells(height, width)
    rows = x.new_empty((batch * cells[0] * cells[1], numbers))
    result = x.new_empty((clients, batch, *cells, outs))
    for client in range(clients):
        im2col_rows(images[client], rows.view(-1).numpy(), geometry)
        torch.addmm(bias[client], rows, weight[client].t(), out=result[client].view(-1, outs))

    def backward(grads: Tensor) -> tuple[Tensor, BatchGradients]:
        of_result = grads.permute(_CHANNELS_LAST).contiguous().view(clients, -1, outs)
        of_images, of_weight = torch.empty_like(x), torch.empty_like(weight)
        for client, products in enumerate(of_result):
            im2col_rows(images[client], rows.view(-1).numpy(), geometry)
            torch.mm(products.t(), rows, out=of_weight[client])
            torch.mm(products, weight[client], out=rows)
            col2im(rows.view(-1).numpy(), _flat(of_images)[client], geometry)
        return of_images.permute(_CHANNELS_FIRST), BatchGradients(of_weight, of_result.sum(dim=1))

    return result.permute(_CHANNELS_FIRST), backward


def _by_rows(
    window: ConvolutionWindow,
    weight: Tensor,
    bias: Tensor,
    x: Tensor,
    *,
    relu: bool,
    first: bool,
    per_example: bool,
) -> tuple[Tensor, Backward]:
    """Runs ``x``, ``(K, B, H, W, C)``, by matrix products with patches, forward and backward."""
    x = x.contiguous()
    clients, batch, height, width, channels = x.shape
    outs = weight.shape[1]
    geometry = conv_geometry(window, height, width, channels)
    blocks = blocks_of(window, height, width)
    result, places, rows, products = _rows_forward(
        window, weight, bias, x, relu=relu, keep=True, per_example=per_example
    )
    of_products = _lines(products)

    def backward(grads: Tensor) -> tuple[Tensor, Share | BatchGradients]:
        of_result = _lines(grads.permute(_CHANNELS_LAST).contiguous())
        of_bias = grads.new_empty((clients, batch, 1, outs))
        of_images = torch.empty_like(x)
        gradient = torch.empty_like(weight)
        for client in range(clients):
            place = client if per_example else 0  # otherwise products are not needed again
            one = of_result[client], places[client], of_products[place]
            unpool(*one, _lines(of_bias)[client], blocks)
            if not per_example:
                _multiply_backward(rows[client], products[place], gradient[client])
            if not first:
                back = products[place].flatten(0, 1) @ weight[client]
                col2im(back.view(-1).numpy(), _flat(of_images)[client], geometry)
        part: Share | BatchGradients = (rows, products, of_bias)
        if not per_example:
            part = BatchGradients(gradient, of_bias.sum(dim=(1, 2)))
        return of_images.permute(_CHANNELS_FIRST), part

    return result.permute(_CHANNELS_FIRST), backward


def _rows_forward(
    window: ConvolutionWindow,
    weight: Tensor,
    bias: Tensor,
    x: Tensor,
    *,
    relu: bool,
    keep: bool,
    per_example: bool = False,
) -> tuple[Tensor, Any, Tensor, Tensor]:
    """Runs the forward pass by a matrix product, with each patch in a row.

    Args:
        window: The convolution's window.
        weight: Shape ``(K, out, F)``.
        bias: Shape ``(K, out)``.
        x: Shape ``(K, B, H, W, C)``, contiguous.
        relu: Whether a ReLU follows.
        keep: Whether to keep every client's patches; otherwise clients share one buffer.
        per_example: Whether to keep every client's products; otherwise clients share one buffer.

    Returns:
        Pooled results, the positions of the maxima in their blocks, patches and products.
    """
    clients, batch, height, width, channels = x.shape
    outs, numbers = weight.shape[1:]
    geometry = conv_geometry(window, height, width, channels)
    blocks = blocks_of(window, height, width)
    count = geometry[-2] * geometry[-1]
    short = window.kernel[1] * channels < _SHORT
    kept = clients if keep else 1
    rows = x.new_empty((kept, batch, numbers, count) if short else (kept, batch, count, numbers))
    lay = im2col_columns if short else im2col_rows
    images, of_rows = _flat(x), _flat(rows)
    rows = rows.transpose(2, 3) if short else rows
    products = x.new_empty((clients if per_example else 1, batch, count, outs))
    result = x.new_empty((clients, batch, *blocks[:2], outs))
    found = _lines(result)
    places = torch.empty(found.shape, dtype=torch.uint8).numpy()
    for client in range(clients):
        at, to = client if keep else 0, client if per_example else 0
        lay(images[client], of_rows[at], geometry)
        _multiply(rows[at], weight[client], products[to])
        one = found[client], places[client]
        pool(_lines(products)[to], bias[client : client + 1].numpy(), *one, blocks, relu)
    return result, places, rows, products


def _multiply(rows: Tensor, weight: Tensor, products: Tensor) -> None:
    """Multiplies ``(B, R, F)`` by ``(out, F)`` to ``(B, R, out)``; one product if contiguous."""
    if rows.is_contiguous():
        torch.mm(rows.flatten(0, 1), weight.t(), out=products.flatten(0, 1))
    else:
        torch.bmm(rows, weight.t().expand(len(rows), -1, -1), out=products)


def _multiply_backward(rows: Tensor, grads: Tensor, gradient: Tensor) -> None:
    """Multiplies ``(B, R, F)`` and ``(B, R, out)`` to the weight's gradient ``(out, F)``."""
    if rows.is_contiguous():
        torch.mm(grads.flatten(0, 1).t(), rows.flatten(0, 1), out=gradient)
    else:
        torch.sum(torch.bmm(rows.transpose(1, 2), grads), dim=0, out=gradient.t())


def _tiled(window: ConvolutionWindow, x: Tensor, outs: int) -> bool:
    """Returns whether Winograd tiles fit the convolution and the buffers, and are faster."""
    _, _, height, width, channels = x.shape
    fits = (window.kernel, window.stride, window.pool) == ((3, 3), (1, 1), (2, 2))
    across = window.cells(height, width)[1]
    wide = max(channels, outs)
    return (
        fits and min(channels, outs) >= _FEW and wide <= MAX_CHANNELS and across * channels <= LANE
    )


def _tiles_forward(
    window: ConvolutionWindow, weight: Tensor, bias: Tensor, x: Tensor, *, relu: bool
) -> tuple[Tensor, Any]:
    """Runs the forward pass by Winograd tiles, one per pooling block.

    Returns:
        Pooled results, and the positions of the maxima in their blocks.
    """
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
    most = min(batch * down, LANE // (across * channels))  # tile rows per product
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
    """Returns blocks of tile rows that fit the buffers: first row, number of rows, tile slice."""
    blocks = []
    for first in range(0, rows, most):
        last = min(rows, first + most)
        blocks.append((first, last - first, slice(first * across, last * across)))
    return blocks


def _flat(tensor: Tensor) -> Any:
    """Views ``(K, ...)`` as one flat NumPy row per client."""
    return tensor.view(len(tensor), -1).numpy()


def _lines(tensor: Tensor) -> Any:
    """Views ``(K, ..., out)`` as a NumPy array ``(K, N, out)``."""
    return tensor.view(len(tensor), -1, tensor.shape[-1]).numpy()
