"""Compiled loops of a model's first convolution with pooling and ReLU, for images of few channels.

A kernel's weights stay in registers while the loop passes over the images, and no patches are laid
out. With one channel, patches would have nine times as many numbers as the image, and their
products four times as many as pooling keeps.
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

_MAX_NUMBERS = 80  # numbers of a kernel: loops are unrolled; more take seconds to compile
_MAX_PRODUCTS = 320  # products per pooling block

Shape = tuple[int, int, int, int, int, int, int, int]
"""The kernel's height, and its width times channels; the pooling block's height and width; the
distance between its results, in lines down and numbers across; vector lanes; channels."""
Size = tuple[int, int, int, int]
"""Height and width of an image, blocks down and across."""


@dataclass(frozen=True)
class Direct:
    """The forward and backward loops of a convolution, from `direct`."""

    forward: Callable[[Floats, Floats, Floats, Floats, Bytes, Size, bool], None]
    """Forward loop. Reads images ``(K, N * H * W * C)``, padded; weights ``(K, F, out)``, ``F`` in
    the order (kernel's height, its width, channel); biases ``(K, out)``. Fills pooled results and
    the maxima's positions, both ``(K, N * blocks, out)``, in the form of
    `fedcore.kernels.im2col.pool`."""
    backward: Callable[[Floats, Floats, Floats, Floats, Bytes, Size], None]
    """Backward loop. Takes images, outputs for the gradients of weights and of biases, gradients of
    the pooled results, and the maxima's positions."""


@functools.cache
def direct(window: ConvolutionWindow, channels: int, outs: int) -> Direct | None:
    """Compiles the loops for images of so many channels; None where other loops are faster.

    The first call takes about a second.

    Args:
        window: The convolution's window; images must be padded already.
        channels: Channels of the images.
        outs: Channels of the results.
    """
    (high, wide), (down, across), (tall, broad) = window.kernel, window.stride, window.pool
    numbers, lanes = high * wide * channels, vector_length(outs)
    if not lanes or numbers > _MAX_NUMBERS or numbers * tall * broad > _MAX_PRODUCTS:
        return None
    shape: Shape = (high, wide * channels, tall, broad, down, across * channels, lanes, channels)
    return Direct(_forward(shape), _backward(shape))


def _forward(shape: Shape) -> Any:
    high, run, tall, broad, down, across, lanes, channels = shape

    @compiled(
        "void(float32[:, ::1], float32[:, :, ::1], float32[:, ::1], float32[:, :, ::1], "
        "uint8[:, :, ::1], UniTuple(int64, 4), boolean)",
        fastmath=set(),
        shape=shape,
    )
    def forward(
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
                    _row_forward(
                        image + 4 * start, weight + 4 * first, bias + 4 * first, result + 4 * at,
                        place + at, line, outs, blocks, relu,
                        high, run, tall, broad, down, across, lanes,
                    )  # fmt: skip

    return forward


def _backward(shape: Shape) -> Any:
    high, run, tall, broad, down, across, lanes, channels = shape

    @compiled(
        "void(float32[:, ::1], float32[:, :, ::1], float32[:, ::1], float32[:, :, ::1], "
        "uint8[:, :, ::1], UniTuple(int64, 4))",
        fastmath=set(),
        shape=shape,
    )
    def backward(
        images: Floats,
        of_weights: Floats,
        of_biases: Floats,
        grads: Floats,
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
            grad, place = grads[client].ctypes.data, places[client].ctypes.data
            for first in range(0, outs, lanes):
                for row in range(grads.shape[1] // blocks):
                    start = (row // rows * height + row % rows * tall * down) * line
                    at = row * blocks * outs + first
                    _row_backward(
                        image + 4 * start, weight + 4 * first, bias + 4 * first, grad + 4 * at,
                        place + at, line, outs, blocks,
                        high, run, tall, broad, down, across, lanes,
                    )  # fmt: skip

    return backward


@emitter
def _row_forward(
    typing: Any, image: Any, weight: Any, bias: Any, found: Any, places: Any, line: Any, outs: Any,
    blocks: Any, relu: Any, high: Any, run: Any, tall: Any, broad: Any, down: Any, across: Any,
    lanes: Any,
) -> Any:  # fmt: skip
    """Emits the forward pass of a row of blocks for one vector of outputs; arrays are addresses."""
    given = (image, weight, bias, found, places, line, outs, blocks, relu)
    shape = (high, run, tall, broad, down, across, lanes)

    def write(context: Any, builder: Builder, _: Any, args: Any) -> Value:
        image, weight, bias, found, places, line, outs, blocks, relu, *_ = args
        width = lanes.literal_value
        kernel = [
            load(builder, FLOAT, weight, builder.mul(outs, constant(place)), width)
            for place in range(high.literal_value * run.literal_value)
        ]
        own = load(builder, FLOAT, bias, constant(0), width)
        cut = broadcast(builder, relu, width)
        none, off = constant_vector(FLOAT, 0.0, width), constant_vector(BYTE, OFF, width)
        with counted(builder, blocks) as loop:
            sums = []
            for looks in _patch_vectors(builder, image, line, loop.index, shape):
                products = [
                    multiply(builder, look, one) for look, one in zip(looks, kernel, strict=True)
                ]
                sums.append(functools.reduce(functools.partial(add, builder), products))
            largest, which = sums[0], constant_vector(BYTE, 0, width)
            for place, value in enumerate(sums[1:], 1):
                # Also true for NaN, which then propagates.
                more = builder.or_(
                    builder.fcmp_ordered(">", value, largest),
                    builder.fcmp_unordered("uno", value, value),
                )
                largest = builder.select(more, value, largest)
                which = builder.select(more, constant_vector(BYTE, place, width), which)
            value = builder.fadd(largest, own)
            cuts = builder.and_(cut, builder.fcmp_ordered("<=", value, none))
            to = builder.mul(loop.index, outs)
            store(builder, FLOAT, builder.select(cuts, none, value), found, to)
            store(builder, BYTE, builder.select(cuts, off, which), places, to)
        return context.get_dummy_value()

    return types.void(*given, *shape), write


@emitter
def _row_backward(
    typing: Any, image: Any, weight: Any, bias: Any, grads: Any, places: Any, line: Any, outs: Any,
    blocks: Any, high: Any, run: Any, tall: Any, broad: Any, down: Any, across: Any, lanes: Any,
) -> Any:  # fmt: skip
    """Emits the backward pass of `_row_forward`; adds to the gradients of weight and bias."""
    given = (image, weight, bias, grads, places, line, outs, blocks)
    shape = (high, run, tall, broad, down, across, lanes)

    def write(context: Any, builder: Builder, _: Any, args: Any) -> Value:
        image, weight, bias, grads, places, line, outs, blocks, *_ = args
        width = lanes.literal_value
        at = [builder.mul(outs, constant(k)) for k in range(high.literal_value * run.literal_value)]
        none = constant_vector(FLOAT, 0.0, width)
        sums, own = [memory(builder, none) for _ in at], memory(builder, none)
        with counted(builder, blocks) as loop:
            start = builder.mul(loop.index, outs)
            grad = load(builder, FLOAT, grads, start, width)
            place = load(builder, BYTE, places, start, width)
            for result, looks in enumerate(_patch_vectors(builder, image, line, loop.index, shape)):
                here = builder.icmp_unsigned("==", place, constant_vector(BYTE, result, width))
                taken = builder.select(here, grad, none)
                builder.store(add(builder, builder.load(own), taken), own)
                for look, one in zip(looks, sums, strict=True):
                    product = multiply(builder, taken, look)
                    builder.store(add(builder, builder.load(one), product), one)
        # One partial sum per row of blocks: a single sum over a large image would round more.
        for place, one in zip(at, sums, strict=True):
            total = add(builder, load(builder, FLOAT, weight, place, width), builder.load(one))
            store(builder, FLOAT, total, weight, place)
        total = add(builder, load(builder, FLOAT, bias, constant(0), width), builder.load(own))
        store(builder, FLOAT, total, bias, constant(0))
        return context.get_dummy_value()

    return types.void(*given, *shape), write


def _patch_vectors(
    builder: Builder, image: Value, line: Value, block: Value, shape: Sequence[Any]
) -> Iterator[list[Value]]:
    """Yields, for each result of a block, its input patch, each number spread over a vector."""
    high, run, tall, broad, down, across, lanes = (one.literal_value for one in shape)
    left = builder.mul(block, constant(broad * across))
    for y, x in itertools.product(range(tall), range(broad)):
        looks = []
        for i in range(high):
            begin = builder.add(left, builder.mul(line, constant(y * down + i)))
            for j in range(run):
                at = builder.add(begin, constant(x * across + j))
                looks.append(broadcast(builder, load(builder, FLOAT, image, at), lanes))
        yield looks
