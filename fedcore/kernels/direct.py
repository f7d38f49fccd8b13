"""Compiled loops of a model's first convolution, with its pooling and ReLU, of few channels.

A kernel's numbers stay in registers while images go by, and nothing is laid out: of one channel,
rows would be nine times as many numbers as the image, and their products four times as many as what
pooling leaves.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from numba.core import types

from fedcore.kernels.compiled import compiled
from fedcore.kernels.im2col import OFF, Bytes, Floats
from fedcore.kernels.llvm import (
    BYTE,
    FLOAT,
    Builder,
    Value,
    added,
    counted,
    every,
    known,
    lanes_of,
    load,
    memory,
    multiplied,
    spread,
    store,
    written,
)
from fedcore.kernels.window import ConvolutionWindow

_MOST_NUMBERS = 80  # of a kernel: more are written down at length, and compiled for seconds
_MOST_PRODUCTS = 320  # of a block

Shape = tuple[int, int, int, int, int, int, int, int]
"""Of a kernel: its height, its width times channels; of the block of pooling: height, width; the
distance of its results: lines down, numbers across; lanes of a vector; channels."""
Size = tuple[int, int, int, int]
"""Height and width of an image, blocks down and across."""


@dataclass(frozen=True)
class Direct:
    """A convolution's loops, see `direct`."""

    ahead: Callable[[Floats, Floats, Floats, Floats, Bytes, Size, bool], None]
    """Takes images ``(K, N * H * W * C)``, padded; weights ``(K, F, out)``, ``F`` in the order
    (kernel's height, its width, channel); biases ``(K, out)``. Fills what is found and places,
    ``(K, N * blocks, out)`` both, as `fedcore.kernels.im2col.pool` does."""
    back: Callable[[Floats, Floats, Floats, Floats, Bytes, Size], None]
    """Takes images, and as last arguments the slopes and places of what was found. Fills the slopes
    of weights and of biases."""


@functools.cache
def direct(window: ConvolutionWindow, channels: int, outs: int) -> Direct | None:
    """Compiles the loops for images of so many channels; None where others are the better way.

    The first time takes about a second.

    Args:
        window: Of the convolution; images are padded already.
        channels: Of images.
        outs: Channels of results.
    """
    (high, wide), (down, across), (tall, broad) = window.kernel, window.stride, window.pool
    numbers, lanes = high * wide * channels, lanes_of(outs)
    if not lanes or numbers > _MOST_NUMBERS or numbers * tall * broad > _MOST_PRODUCTS:
        return None
    shape: Shape = (high, wide * channels, tall, broad, down, across * channels, lanes, channels)
    return Direct(_ahead(shape), _back(shape))


def _ahead(shape: Shape) -> Any:
    high, run, tall, broad, down, across, lanes, channels = shape

    @compiled(
        "void(float32[:, ::1], float32[:, :, ::1], float32[:, ::1], float32[:, :, ::1], "
        "uint8[:, :, ::1], UniTuple(int64, 4), boolean)",
        fastmath=set(),
        shape=shape,
    )
    def ahead(
        images: Floats,
        weights: Floats,
        biases: Floats,
        found: Floats,
        places: Bytes,
        size: Size,
        relu: bool,
    ) -> None:
        height, width, rows, blocks = size
        line, outs = width * channels, weights.shape[2]
        for client in range(weights.shape[0]):
            image, weight = images[client].ctypes.data, weights[client].ctypes.data
            bias = biases[client].ctypes.data
            result, place = found[client].ctypes.data, places[client].ctypes.data
            for row in range(found.shape[1] // blocks):
                start = (row // rows * height + row % rows * tall * down) * line
                for first in range(0, outs, lanes):
                    at = row * blocks * outs + first
                    _row_ahead(
                        image + 4 * start, weight + 4 * first, bias + 4 * first, result + 4 * at,
                        place + at, line, outs, blocks, relu,
                        high, run, tall, broad, down, across, lanes,
                    )  # fmt: skip

    return ahead


def _back(shape: Shape) -> Any:
    high, run, tall, broad, down, across, lanes, channels = shape

    @compiled(
        "void(float32[:, ::1], float32[:, :, ::1], float32[:, ::1], float32[:, :, ::1], "
        "uint8[:, :, ::1], UniTuple(int64, 4))",
        fastmath=set(),
        shape=shape,
    )
    def back(
        images: Floats,
        of_weights: Floats,
        of_biases: Floats,
        slopes: Floats,
        places: Bytes,
        size: Size,
    ) -> None:
        height, width, rows, blocks = size
        line, outs = width * channels, of_weights.shape[2]
        of_weights[:] = 0
        of_biases[:] = 0
        for client in range(of_weights.shape[0]):
            image, weight = images[client].ctypes.data, of_weights[client].ctypes.data
            bias = of_biases[client].ctypes.data
            slope, place = slopes[client].ctypes.data, places[client].ctypes.data
            for first in range(0, outs, lanes):
                for row in range(slopes.shape[1] // blocks):
                    start = (row // rows * height + row % rows * tall * down) * line
                    at = row * blocks * outs + first
                    _row_back(
                        image + 4 * start, weight + 4 * first, bias + 4 * first, slope + 4 * at,
                        place + at, line, outs, blocks,
                        high, run, tall, broad, down, across, lanes,
                    )  # fmt: skip

    return back


@written
def _row_ahead(
    typing: Any, image: Any, weight: Any, bias: Any, found: Any, places: Any, line: Any, outs: Any,
    blocks: Any, relu: Any, high: Any, run: Any, tall: Any, broad: Any, down: Any, across: Any,
    lanes: Any,
) -> Any:  # fmt: skip
    """One row of blocks, as many outputs as a vector has lanes; memory by its addresses."""
    given = (image, weight, bias, found, places, line, outs, blocks, relu)
    shape = (high, run, tall, broad, down, across, lanes)

    def write(context: Any, builder: Builder, _: Any, args: Any) -> Value:
        image, weight, bias, found, places, line, outs, blocks, relu, *_ = args
        width = lanes.literal_value
        kernel = [
            load(builder, FLOAT, weight, builder.mul(outs, known(place)), width)
            for place in range(high.literal_value * run.literal_value)
        ]
        own = load(builder, FLOAT, bias, known(0), width)
        cut = spread(builder, relu, width)
        none, off = every(FLOAT, 0.0, width), every(BYTE, OFF, width)
        with counted(builder, blocks) as loop:
            sums = []
            for looks in _looked_at(builder, image, line, loop.index, shape):
                products = [
                    multiplied(builder, look, one) for look, one in zip(looks, kernel, strict=True)
                ]
                sums.append(functools.reduce(functools.partial(added, builder), products))
            largest, which = sums[0], every(BYTE, 0, width)
            for place, value in enumerate(sums[1:], 1):
                # True for what is no number, too: once found, it stays.
                more = builder.or_(
                    builder.fcmp_ordered(">", value, largest),
                    builder.fcmp_unordered("uno", value, value),
                )
                largest = builder.select(more, value, largest)
                which = builder.select(more, every(BYTE, place, width), which)
            value = builder.fadd(largest, own)
            cuts = builder.and_(cut, builder.fcmp_ordered("<=", value, none))
            to = builder.mul(loop.index, outs)
            store(builder, FLOAT, builder.select(cuts, none, value), found, to)
            store(builder, BYTE, builder.select(cuts, off, which), places, to)
        return context.get_dummy_value()

    return types.void(*given, *shape), write


@written
def _row_back(
    typing: Any, image: Any, weight: Any, bias: Any, slopes: Any, places: Any, line: Any, outs: Any,
    blocks: Any, high: Any, run: Any, tall: Any, broad: Any, down: Any, across: Any, lanes: Any,
) -> Any:  # fmt: skip
    """The way back of `_row_ahead`, added to the slopes of the weight and of the bias."""
    given = (image, weight, bias, slopes, places, line, outs, blocks)
    shape = (high, run, tall, broad, down, across, lanes)

    def write(context: Any, builder: Builder, _: Any, args: Any) -> Value:
        image, weight, bias, slopes, places, line, outs, blocks, *_ = args
        width = lanes.literal_value
        at = [builder.mul(outs, known(k)) for k in range(high.literal_value * run.literal_value)]
        none = every(FLOAT, 0.0, width)
        sums, own = [memory(builder, none) for _ in at], memory(builder, none)
        with counted(builder, blocks) as loop:
            start = builder.mul(loop.index, outs)
            slope = load(builder, FLOAT, slopes, start, width)
            place = load(builder, BYTE, places, start, width)
            for result, looks in enumerate(_looked_at(builder, image, line, loop.index, shape)):
                here = builder.icmp_unsigned("==", place, every(BYTE, result, width))
                taken = builder.select(here, slope, none)
                builder.store(added(builder, builder.load(own), taken), own)
                for look, one in zip(looks, sums, strict=True):
                    product = multiplied(builder, taken, look)
                    builder.store(added(builder, builder.load(one), product), one)
        # Each row of blocks has a sum of its own: one over a large image would round away more.
        for place, one in zip(at, sums, strict=True):
            total = added(builder, load(builder, FLOAT, weight, place, width), builder.load(one))
            store(builder, FLOAT, total, weight, place)
        total = added(builder, load(builder, FLOAT, bias, known(0), width), builder.load(own))
        store(builder, FLOAT, total, bias, known(0))
        return context.get_dummy_value()

    return types.void(*given, *shape), write


def _looked_at(
    builder: Builder, image: Value, line: Value, block: Value, shape: Sequence[Any]
) -> Iterator[list[Value]]:
    """For each result of a block, what it looks at, each number spread over a vector."""
    high, run, tall, broad, down, across, lanes = (one.literal_value for one in shape)
    left = builder.mul(block, known(broad * across))
    for y, x in itertools.product(range(tall), range(broad)):
        looks = []
        for i in range(high):
            begin = builder.add(left, builder.mul(line, known(y * down + i)))
            for j in range(run):
                at = builder.add(begin, known(x * across + j))
                looks.append(spread(builder, load(builder, FLOAT, image, at), lanes))
        yield looks
