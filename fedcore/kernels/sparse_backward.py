"""Compiled backward loops of a convolution, limited to results that pooling and ReLU selected.

In each pooling block at most one result has a nonzero gradient, and none where the ReLU gives 0.
Only the patches of these results contribute to the gradients of weights and image; dense products
would mostly multiply by zero. Start with `compile_sparse_backward`.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
from numba.core import types
from numpy.typing import NDArray

from fedcore.kernels.compiled import compiled, unsigned
from fedcore.kernels.direct import Size
from fedcore.kernels.im2col import OFF, Bytes, Floats
from fedcore.kernels.llvm import (
    FLOAT,
    INT,
    SHORT,
    Builder,
    Value,
    add,
    broadcast,
    constant,
    constant_vector,
    counted,
    emitter,
    load,
    memory,
    multiply,
    store,
    vector_length,
)
from fedcore.kernels.window import ConvolutionWindow

Back = Callable[[Floats, Floats, Floats, Floats, Floats, Floats, Bytes, Size], None]
"""Reads images ``(K, N * H * W * C)``, padded; weights ``(k, out, F)``, ``F`` in the order
(kernel's height, its width, channel), each for ``K / k`` consecutive entries; gradients of the
pooled results ``(K, N, out, down, across)``; and the maxima's positions ``(K, N * blocks, out)``.
Fills the gradients of images, of weights ``(K, out, F)`` and of biases ``(K, out)``. Arguments:
images, their gradients, weights, their gradients, biases' gradients, results' gradients, positions,
size."""

_MAX_PLACES = 64  # positions of a kernel, which are unrolled
_REGISTERS = 12  # kernel positions (and gradients) at once: processors have 16 or 32 vectors
_NEAR_NUMBERS = 8 << 10  # 32 KiB of images and their gradients, in a core's L1 cache


@compiled(
    "void(float32[:, :, :, ::1], uint8[:, ::1], int64[::1], int64, int64, uint32[::1], uint32, "
    "float32[:, ::1], uint32[:, ::1], int64[::1], float32[::1])",
    fastmath=set(),
)
def _list_selected(
    grads: Floats,
    places: Bytes,
    begins: NDArray[np.int64],
    first: int,
    last: int,
    away: NDArray[np.uint32],
    step: np.uint32,
    selected: Floats,
    starts: NDArray[np.uint32],
    counts: NDArray[np.int64],
    of_bias: Floats,
) -> None:
    """Lists the selected results in some rows of blocks, per output: gradient and patch offset.

    Args:
        grads: One client's gradients of the pooled results, ``(N, out, down, across)``.
        places: Their maxima's positions, ``(N * blocks, out)``.
        begins: Offset of each row of blocks, counted over all images.
        first: The first row.
        last: The row after the last.
        away: Offset of each position in a block.
        step: Distance between adjacent blocks.
        selected: Output: the gradients.
        starts: Output: offsets of the patches from the start of the first row.
        counts: Output: number of selected results per output.
        of_bias: Gradients of the biases, to which the listed gradients are added.
    """
    rows, blocks = unsigned(grads.shape[2]), unsigned(grads.shape[3])
    for out in range(unsigned(grads.shape[1])):
        count, total = unsigned(0), np.float32(0)
        image, y = unsigned(first) // rows, unsigned(first) % rows
        for row in range(unsigned(first), unsigned(last)):
            start, at = np.uint32(begins[row] - begins[first]), row * blocks
            for x in range(blocks):
                place, grad = places[at + x, out], grads[image, out, y, x]
                # Always written, but counted only if selected: avoids mispredicted branches.
                selected[out, count], starts[out, count] = grad, start + away[place]
                on = place != OFF
                total += grad if on else np.float32(0)
                count += unsigned(on)
                start += step
            y += unsigned(1)
            if y == rows:
                image, y = image + unsigned(1), unsigned(0)
        counts[out] = count
        of_bias[out] += total


@functools.cache
def compile_sparse_backward(window: ConvolutionWindow, channels: int) -> Back | None:
    """Compiles the loop for images of so many channels; None where no full vectors fit.

    The first call takes about a second.

    Args:
        window: The convolution's window; images must be padded already.
        channels: Channels of the images.
    """
    (high, wide), (down, across), (tall, broad) = window.kernel, window.stride, window.pool
    lanes = vector_length(channels)
    if not lanes or high * wide > _MAX_PLACES:
        return None

    @compiled(
        "void(float32[:, ::1], float32[:, ::1], float32[:, :, ::1], float32[:, :, ::1], "
        "float32[:, ::1], float32[:, :, :, :, ::1], uint8[:, :, ::1], UniTuple(int64, 4))",
        fastmath=set(),
        shape=(window, channels, lanes),
    )
    def backward(
        images: Floats,
        of_images: Floats,
        weights: Floats,
        of_weights: Floats,
        of_biases: Floats,
        grads: Floats,
        places: Bytes,
        size: Size,
    ) -> None:
        height, width, rows, blocks = size
        outs, whole = weights.shape[1], grads.shape[1] * rows  # rows of blocks in all images
        begins = np.empty(whole, np.int64)  # offsets in units of the near buffer, like all below
        for row in range(whole):
            begins[row] = (row // rows * height + row % rows * tall * down) * width * lanes
        away = np.zeros(256, np.uint32)
        for place in range(tall * broad):
            away[place] = (place // broad * down * width + place % broad * across) * lanes
        band = min(whole, max(1, _NEAR_NUMBERS // (2 * tall * down * width * lanes)))
        looked_at = ((tall - 1) * down + high) * width * lanes  # extent from the start of a row
        most = 0
        for first in range(0, whole, band):
            most = max(most, begins[min(whole, first + band) - 1] + looked_at - begins[first])
        near, of_near = np.empty(most, np.float32), np.empty(most, np.float32)
        selected = np.empty((outs, band * blocks), np.float32)
        starts = np.empty((outs, band * blocks), np.uint32)
        counts = np.empty(outs, np.int64)
        step = np.uint32(broad * across * lanes)
        of_images[:] = 0
        of_weights[:] = 0
        of_biases[:] = 0
        each = of_weights.shape[0] // weights.shape[0]
        for client in range(of_weights.shape[0]):
            weight = weights[client // each]
            for first in range(0, whole, band):
                last = min(whole, first + band)
                _list_selected(
                    grads[client], places[client], begins, first, last, away, step,
                    selected, starts, counts, of_biases[client],
                )  # fmt: skip
                begin = begins[first] // lanes
                pixels = (begins[last - 1] + looked_at) // lanes - begin
                for channel in range(0, channels, lanes):
                    at = 4 * (begin * channels + channel)
                    image = images[client].ctypes.data + at
                    of_image = of_images[client].ctypes.data + at
                    _gather(image, near.ctypes.data, pixels, channels, lanes)
                    of_near[:] = 0
                    for out in range(outs):
                        _add(
                            near.ctypes.data, of_near.ctypes.data,
                            weight[out].ctypes.data + 4 * channel,
                            of_weights[client, out].ctypes.data + 4 * channel,
                            selected[out].ctypes.data, starts[out].ctypes.data, counts[out], width,
                            high, wide, channels, lanes,
                        )  # fmt: skip
                    _scatter(of_near.ctypes.data, of_image, pixels, channels, lanes)

    return backward


@emitter
def _gather(typing: Any, images: Any, near: Any, pixels: Any, channels: Any, lanes: Any) -> Any:
    """Emits a copy of some channels of pixels into a contiguous buffer."""

    def write(context: Any, builder: Builder, _: Any, args: Any) -> Value:
        images, near, pixels, *_ = args
        width = lanes.literal_value
        with counted(builder, pixels) as loop:
            at = builder.mul(loop.index, constant(channels.literal_value))
            to = builder.mul(loop.index, constant(width))
            store(builder, FLOAT, load(builder, FLOAT, images, at, width), near, to)
        return context.get_dummy_value()

    return types.void(images, near, pixels, channels, lanes), write


@emitter
def _scatter(typing: Any, near: Any, images: Any, pixels: Any, channels: Any, lanes: Any) -> Any:
    """Emits the reverse of `_gather`: adds a contiguous buffer to some channels of pixels."""

    def write(context: Any, builder: Builder, _: Any, args: Any) -> Value:
        near, images, pixels, *_ = args
        width = lanes.literal_value
        with counted(builder, pixels) as loop:
            at = builder.mul(loop.index, constant(width))
            to = builder.mul(loop.index, constant(channels.literal_value))
            held = load(builder, FLOAT, images, to, width)
            more = load(builder, FLOAT, near, at, width)
            store(builder, FLOAT, add(builder, held, more), images, to)
        return context.get_dummy_value()

    return types.void(near, images, pixels, channels, lanes), write


@emitter
def _add(
    typing: Any, near: Any, of_near: Any, weight: Any, of_weight: Any, selected: Any, starts: Any,
    count: Any, pixels: Any, high: Any, wide: Any, channels: Any, lanes: Any,
) -> Any:  # fmt: skip
    """Emits the gradients from one output's selected results; ``pixels`` is the width of a line."""
    given = (near, of_near, weight, of_weight, selected, starts, count, pixels)
    places = list(itertools.product(range(high.literal_value), range(wide.literal_value)))
    each = -(-len(places) // -(-len(places) // _REGISTERS))  # in parts of similar size
    width = lanes.literal_value

    def write(context: Any, builder: Builder, _: Any, args: Any) -> Value:
        for part in range(0, len(places), each):
            write_part(builder, args, places[part : part + each])
        return context.get_dummy_value()

    def write_part(builder: Builder, args: Any, part: list[tuple[int, int]]) -> None:
        near, of_near, weight, of_weight, selected, starts, count, pixels, *_ = args
        line = builder.mul(pixels, constant(width))
        at = [constant((i * wide.literal_value + j) * channels.literal_value) for i, j in part]
        own = [load(builder, FLOAT, weight, one, width) for one in at]
        sums = [
            memory(builder, constant_vector(FLOAT, 0.0, width)) for _ in at
        ]  # for this band only
        away = [builder.add(builder.mul(line, constant(i)), constant(j * width)) for i, j in part]
        with counted(builder, count) as loop:
            grad = broadcast(builder, load(builder, FLOAT, selected, loop.index), width)
            start = builder.zext(load(builder, SHORT, starts, loop.index), INT)
            for kernel, total, distance in zip(own, sums, away, strict=True):
                place = builder.add(start, distance)
                look = load(builder, FLOAT, near, place, width)
                product = multiply(builder, grad, look)
                builder.store(add(builder, builder.load(total), product), total)
                held = load(builder, FLOAT, of_near, place, width)
                product = multiply(builder, grad, kernel)
                store(builder, FLOAT, add(builder, held, product), of_near, place)
        for one, total in zip(at, sums, strict=True):
            before = load(builder, FLOAT, of_weight, one, width)
            store(builder, FLOAT, add(builder, before, builder.load(total)), of_weight, one)

    return types.void(*given, high, wide, channels, lanes), write
