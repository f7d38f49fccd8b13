"""Convolutions over many clients' batches as matrix products, and the pooling that follows them.

A convolution is one matrix product once each input patch is laid out as a row. The product over a
client's whole batch keeps a processor twice as busy as direct convolutions of ten images do.

In all shapes, pooling has ``P`` blocks of ``q`` convolution results each, and a patch ``F`` numbers
in the order (kernel's height, its width, channel).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.grad import conv2d_input

from fedcore.kernels.window import ConvolutionWindow

_FEW_CHANNELS = 8  # with fewer, rows are too short to copy efficiently


def patches(x: Tensor, window: ConvolutionWindow) -> Tensor:
    """Returns a convolution's input patches, one row for each result that pooling needs.

    Args:
        x: Shape ``(K, B, C, H, W)``; fastest where channels are innermost in memory, or few.
        window: The convolution's window.

    Returns:
        Shape ``(K, B, q * P, F)``: ``q`` places in a block times ``P`` blocks, and ``F`` numbers
        each, in the order (kernel's height, its width, channel).
    """
    x = _padded(x, window)
    clients, batch, channels = x.shape[:3]
    if channels < _FEW_CHANNELS:  # copies long runs along the image, then transposes
        rows = _patches(x, window).permute(0, 6, 7, 8, 1, 2, 3, 4, 5)
        numbers = rows.shape[1] * rows.shape[2] * rows.shape[3]
        return rows.reshape(clients, numbers, batch, -1).permute(0, 2, 3, 1)
    x = x.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)
    rows = _patches(x, window)
    numbers = rows.shape[6] * rows.shape[7] * rows.shape[8]
    return rows.reshape(clients, batch, -1, numbers)


def convolved(x: Tensor, weight: Tensor, window: ConvolutionWindow) -> Tensor | None:
    """Returns the products of `patches` and weights by torch's convolution, where that is faster.

    That is for one client on a CPU, for which torch's matrix library takes twice as long, unless
    images have few channels: reordering the results then takes longer.

    Args:
        x: Shape ``(1, B, C, H, W)``.
        weight: Shape ``(1, out, F)``.
        window: The convolution's window.

    Returns:
        Shape ``(1, B, q * P, out)``; None where matrix products are faster.
    """
    batch, channels = x.shape[1:3]
    if len(x) > 1 or x.is_cuda or channels < _FEW_CHANNELS:
        return None
    kernel = weight.view(-1, *window.kernel, channels).permute(0, 3, 1, 2)
    found = functional.conv2d(x[0], kernel, stride=window.stride, padding=window.padding)
    (high, wide), (down, across) = window.pool, window.cells(*x.shape[3:])
    cropped = found[:, :, : high * down, : wide * across]
    blocks = cropped.reshape(batch, -1, down, high, across, wide).permute(0, 3, 5, 2, 4, 1)
    return blocks.reshape(1, batch, -1, found.shape[1])


def with_input_gradient(x: Tensor, z: Tensor, weight: Tensor, window: ConvolutionWindow) -> Tensor:
    """Returns ``z`` with a backward pass from its gradients to those of ``x``.

    Args:
        x: The convolution's input, ``(K, B, C, H, W)``.
        z: Its products, ``(K, B, q * P, out)``, without a backward pass.
        weight: Shape ``(K, out, F)``.
        window: The convolution's window.
    """
    found: Tensor = _BackToImage.apply(x, z, weight, window)  # type: ignore[no-untyped-call]
    return found


def largest(z: Tensor, axis: int) -> Tensor:
    """Returns the maximum along an axis; gradients of ties go to the first one, as in torch.

    Args:
        z: Any shape.
        axis: A short axis: the code loops over its places.
    """
    if z.shape[axis] == 1:
        return z.squeeze(axis)
    found: Tensor = _Largest.apply(z, axis)  # type: ignore[no-untyped-call]
    return found


def _padded(x: Tensor, window: ConvolutionWindow) -> Tensor:
    down, across = window.padding
    return functional.pad(x, (across, across, down, down)) if down or across else x


def _patches(x: Tensor, window: ConvolutionWindow) -> Tensor:
    """Returns a view of padded ``x``: ``(K, B, q down, q across, P down, P across, kh, kw, C)``.

    The places in a block come before the blocks, so that the values that pooling compares form runs
    as long as an image has blocks.
    """
    client, example, channel, down, across = x.stride()
    (high, wide), (step_down, step_across) = window.pool, window.stride
    cells_down, cells_across = replace(window, padding=(0, 0)).cells(x.shape[3], x.shape[4])
    return x.as_strided(
        (*x.shape[:2], high, wide, cells_down, cells_across, *window.kernel, x.shape[2]),
        (
            *(client, example, step_down * down, step_across * across),
            *(high * step_down * down, wide * step_across * across),
            *(down, across, channel),
        ),
        x.storage_offset(),
    )


class _BackToImage(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, z: Tensor, weight: Tensor, window: ConvolutionWindow
    ) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.window, ctx.shape = window, x.shape
        return z.view_as(z)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (weight,) = ctx.saved_tensors
        if len(weight) == 1 and not weight.is_cuda:
            one = input_gradient_single(grads[0], weight, ctx.window, ctx.shape)
            return one, None, None, None
        at_once = ctx.shape[0] if weight.is_cuda else 1  # more would exceed a core's cache
        return input_gradient(grads[0], weight, ctx.window, ctx.shape, at_once), None, None, None


def input_gradient(
    grads: Tensor, weight: Tensor, window: ConvolutionWindow, shape: Sequence[int], at_once: int
) -> Tensor:
    """Returns the input's gradients: per kernel element, one product added to a shifted image.

    Args:
        grads: Gradients of the convolution's products, ``(K, B, q * P, out)``.
        weight: Shape ``(K, out, F)``.
        window: The convolution's window.
        shape: Shape of the input and the result, ``(K, B, C, H, W)``.
        at_once: Number of clients whose products are computed together.
    """
    clients, batch, channels, height, width = shape
    kernel, (down, across), cells = window.kernel, window.padding, window.cells(height, width)
    rows = grads.view(clients, batch, *window.pool, *cells, -1)
    size = cells[0] * window.pool[0], cells[1] * window.pool[1]
    rows = rows.permute(0, 1, 4, 2, 5, 3, 6).reshape(clients, batch * size[0] * size[1], -1)
    places = weight.view(clients, -1, kernel[0] * kernel[1], channels).permute(2, 0, 1, 3)
    whole = weight.new_zeros((clients, batch, height + 2 * down, width + 2 * across, channels))
    client, example, line, column, _ = whole.stride()
    steps = client, example, window.stride[0] * line, window.stride[1] * column, 1
    for first in range(0, clients, at_once):
        some = slice(first, first + at_once)
        of_them = rows[some]
        one = weight.new_empty((len(of_them), rows.shape[1], channels))
        image = one.view(len(of_them), batch, *size, channels)
        for number, part in enumerate(places[:, some].unbind()):
            torch.bmm(of_them, part, out=one)
            y, x = divmod(number, kernel[1])
            start = first * client + y * line + x * column
            whole.as_strided(image.shape, steps, start).add_(image)
    return whole[:, :, down : down + height, across : across + width].permute(0, 1, 4, 2, 3)


def input_gradient_single(
    grads: Tensor, weight: Tensor, window: ConvolutionWindow, shape: Sequence[int]
) -> Tensor:
    """Returns one client's input gradients by torch's convolution, which is faster for few images.

    Args:
        grads: Gradients of the convolution's products, ``(1, B, q * P, out)``.
        weight: Shape ``(1, out, F)``.
        window: The convolution's window.
        shape: Shape of the input and the result, ``(1, B, C, H, W)``.
    """
    _, batch, channels, height, width = shape
    down, across = replace(window, pool=(1, 1)).cells(height, width)
    cells_down, cells_across = window.cells(height, width)
    high, wide = window.pool
    rows = grads.view(batch, high, wide, cells_down, cells_across, -1)
    image = grads.new_zeros(batch, down, across, rows.shape[5])
    for y in range(high):
        for x in range(wide):
            image[:, y : high * cells_down : high, x : wide * cells_across : wide] = rows[:, y, x]
    kernel = weight.view(-1, *window.kernel, channels).permute(0, 3, 1, 2)
    found: Tensor = conv2d_input(  # type: ignore[no-untyped-call]
        (batch, channels, height, width),
        kernel,
        image.permute(0, 3, 1, 2),
        stride=window.stride,
        padding=window.padding,
    )
    return found.unsqueeze(0)


class _Largest(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, axis: int) -> Tensor:
        found = z.amax(axis)
        ctx.axis = axis
        ctx.save_for_backward(z, found)
        return found

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        """Gives each gradient to the first of the places with the maximum.

        Each place takes the gradient where its value is the maximum, and passes the rest to the
        next one.
        """
        z, found = ctx.saved_tensors
        given, left = torch.empty_like(z), grads[0]
        parts, shares = z.unbind(ctx.axis), given.unbind(ctx.axis)
        for part, share in zip(parts[:-2], shares[:-2], strict=True):
            _where_equal(left, part, found, share)
            left = left - share
        _where_equal(left, parts[-2], found, shares[-2])
        torch.sub(left, shares[-2], out=shares[-1])
        return given, None


def _where_equal(grads: Tensor, z: Tensor, found: Tensor, out: Tensor) -> None:
    """Writes ``slopes`` where ``z`` equals its upper bound ``found``, and 0 elsewhere, to ``out``.

    Two passes over floats: comparing and selecting takes five times as long. Values that differ by
    less than float32's smallest normal number count as equal.
    """
    gap = torch.sub(z, found)
    torch.ops.aten.threshold_backward.grad_input(grads, gap, _BELOW_ZERO, grad_input=out)


_BELOW_ZERO = -torch.finfo(torch.float32).tiny  # a smaller one may be flushed to 0
