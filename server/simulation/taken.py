"""Compiled loops back through a convolution from what its pooling and ReLU let through.

Of each block of results one has a slope, and behind a ReLU not even that: what a kernel looked at
there is all that its weights' slopes, and those of the image, come of. The products of a whole
image's slopes are mostly those with nought.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from numba.core import types

from server.simulation.compiled import compiled
from server.simulation.direct import Size, lanes_of
from server.simulation.images import Window
from server.simulation.kernels import OFF, Bytes, Floats
from server.simulation.vectors import (
    FLOAT,
    INT,
    Builder,
    Value,
    added,
    counted,
    known,
    load,
    memory,
    multiplied,
    spread,
    store,
    written,
)

Back = Callable[[Floats, Floats, Floats, Floats, Floats, Floats, Bytes, Size], None]
"""Takes images ``(K, N * H * W * C)``, padded, and room for their slopes; weights ``(K, out, F)``,
``F`` in the order (kernel's height, its width, channel), and room for theirs; room for the slopes
of biases ``(K, out)``; the slopes of what was found, ``(K, N, out, down, across)`` in any order of
memory; and places, ``(K, N * blocks, out)``. Fills all there is room for."""

unsigned: Any = numba.uint64  # as mypy takes it

_MOST_NUMBERS = 9 * 256  # of a kernel: all are written down at length
_REGISTERS = 12  # of a kernel at once, and as many slopes: a processor has 32, or 16
_NEAR_NUMBERS = 10 << 10  # 40 KiB: of images, and their slopes, in a core's nearest cache
_FAR_NUMBERS = 128 << 10  # 512 KiB: in its next, where kernels fill it and go by more often


@functools.cache
def taken_back(window: Window, channels: int, outs: int) -> Back | None:
    """Compiles the loop for images of so many channels; None where no vectors would be filled.

    The first time takes about a second.

    Args:
        window: Of the convolution; images are padded already.
        channels: Of images.
        outs: Channels of results.
    """
    (high, wide), (down, across), (tall, broad) = window.kernel, window.stride, window.pool
    run, lanes = wide * channels, lanes_of(channels)
    if not lanes or high * run > _MOST_NUMBERS:
        return None
    near = _NEAR_NUMBERS if outs * high * run <= _FAR_NUMBERS else _FAR_NUMBERS

    @compiled(
        "void(float32[:, ::1], float32[:, ::1], float32[:, :, ::1], float32[:, :, ::1], "
        "float32[:, ::1], float32[:, :, :, :, :], uint8[:, :, ::1], UniTuple(int64, 4))",
        fastmath=set(),
    )
    def back(
        images: Floats,
        of_images: Floats,
        weights: Floats,
        of_weights: Floats,
        of_biases: Floats,
        slopes: Floats,
        places: Bytes,
        size: Size,
    ) -> None:
        height, width, rows, blocks = size
        line = width * channels
        whole = slopes.shape[1] * rows  # of blocks, of all images of a client
        begins = np.empty(whole, np.uint64)
        for row in range(whole):
            begins[row] = (row // rows * height + row % rows * tall * down) * line
        away = np.zeros(256, np.uint64)  # of each place in a block
        for place in range(tall * broad):
            away[place] = place // broad * down * line + place % broad * across * channels
        step = unsigned(broad * across * channels)
        band = max(1, near // (2 * tall * down * line))
        taken = np.empty(band * blocks, np.float32)
        starts = np.empty(band * blocks, np.uint64)
        for client in range(weights.shape[0]):
            of_images[client] = 0
            of_weights[client] = 0
            of_biases[client] = 0
            own_slopes, own_places = slopes[client], places[client]
            for first in range(0, whole, band):
                last = min(whole, first + band)
                for out in range(unsigned(weights.shape[1])):
                    count, total = unsigned(0), np.float32(0)
                    image, y = unsigned(first // rows), unsigned(first % rows)
                    for row in range(unsigned(first), unsigned(last)):
                        start, at = begins[row], row * unsigned(blocks)
                        for x in range(unsigned(blocks)):
                            place, slope = own_places[at + x, out], own_slopes[image, out, y, x]
                            # Written down in any case, counted or not: jumps would be guessed.
                            taken[count], starts[count] = slope, start + away[place]
                            on = place != OFF
                            total += slope if on else np.float32(0)
                            count += unsigned(on)
                            start += step
                        y += unsigned(1)
                        if y == unsigned(rows):
                            image, y = image + unsigned(1), unsigned(0)
                    of_biases[client, out] += total
                    _add(
                        images[client].ctypes.data, of_images[client].ctypes.data,
                        weights[client, out].ctypes.data, of_weights[client, out].ctypes.data,
                        taken.ctypes.data, starts.ctypes.data, count, line, high, run, lanes,
                    )  # fmt: skip

    return back


@written
def _add(
    typing: Any, images: Any, of_images: Any, weight: Any, of_weight: Any, taken: Any, starts: Any,
    count: Any, line: Any, high: Any, run: Any, lanes: Any,
) -> Any:  # fmt: skip
    """Adds all that comes of one output's slopes; memory by its addresses."""
    given = (images, of_images, weight, of_weight, taken, starts, count, line)
    width, whole = lanes.literal_value, high.literal_value * run.literal_value
    parts = -(-whole // (_REGISTERS * width))
    vectors = range(0, whole, width)
    each = -(-len(vectors) // parts)

    def write(context: Any, builder: Builder, _: Any, args: Any) -> Value:
        for part in range(0, len(vectors), each):
            _add_part(builder, args, vectors[part : part + each], run.literal_value, width)
        return context.get_dummy_value()

    return types.void(*given, high, run, lanes), write


def _add_part(builder: Builder, args: Any, part: range, run: int, lanes: int) -> None:
    """As `_add`, of those numbers of a kernel that begin at ``part``, ``run`` of them a line."""
    images, of_images, weight, of_weight, taken, starts, count, line, *_ = args
    own = [load(builder, FLOAT, weight, known(one), lanes) for one in part]
    sums = [memory(builder, load(builder, FLOAT, of_weight, known(one), lanes)) for one in part]
    away = [builder.add(builder.mul(line, known(one // run)), known(one % run)) for one in part]
    with counted(builder, count) as loop:
        slope = spread(builder, load(builder, FLOAT, taken, loop.index), lanes)
        start = load(builder, INT, starts, loop.index)
        for kernel, total, distance in zip(own, sums, away, strict=True):
            at = builder.add(start, distance)
            look = load(builder, FLOAT, images, at, lanes)
            product = multiplied(builder, slope, look)
            builder.store(added(builder, builder.load(total), product), total)
            held = load(builder, FLOAT, of_images, at, lanes)
            product = multiplied(builder, slope, kernel)
            store(builder, FLOAT, added(builder, held, product), of_images, at)
    for one, total in zip(part, sums, strict=True):
        store(builder, FLOAT, builder.load(total), of_weight, known(one))
