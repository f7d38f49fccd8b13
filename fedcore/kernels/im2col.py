"""Compiled loops of a convolution: what it looks at as rows, its pooling, and the ways back.

Importing this compiles them, the first time for some seconds. Each runs in the thread that calls
it, and adds up in an order that is always the same.
"""

from __future__ import annotations

import numpy as np
from numba import uint64
from numpy.typing import NDArray

from fedcore.kernels.compiled import compiled
from fedcore.kernels.window import ConvolutionWindow

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]
Look = tuple[int, int, int, int, int, int, int, int, int, int, int]
"""Height, width and channels of an image; the kernel's height and width, stride and padding, each
down and across; results down and across, of which pooling takes whole blocks."""
Blocks = tuple[int, int, int, int]
"""Blocks down and across, and the height and width of each."""

MOST = 254
"""Results in a block that a byte can tell apart, and from `OFF`."""
OFF = 255
"""In place of one: the largest of the block is no more than 0, and ReLU follows."""


def look_of(window: ConvolutionWindow, height: int, width: int, channels: int) -> Look:
    """What kernels need to know of a convolution of images of that size."""
    down, across = window.cells(height, width)
    results = down * window.pool[0], across * window.pool[1]
    return (height, width, channels, *window.kernel, *window.stride, *window.padding, *results)


def blocks_of(window: ConvolutionWindow, height: int, width: int) -> Blocks:
    """What kernels need to know of the pooling behind it."""
    return *window.cells(height, width), *window.pool


# Indices in the innermost loops are unsigned: of signed ones numba asks each time whether they
# count from the end, and then no loop becomes one of vectors.
_LAY = "void(float32[::1], float32[::1], UniTuple(int64, 11))"


@compiled(_LAY, fastmath=set())
def lay_rows(images: Floats, rows: Floats, look: Look) -> None:
    """What a convolution looks at, a row for each result, one after the other over an image.

    Args:
        images: ``(N, H, W, C)``, flat.
        rows: ``(N * results, F)``, flat, to be filled; in the order (kernel's height, its width,
            channel).
        look: From `look_of`.
    """
    height, width, channels, high, wide, step_y, step_x, pad_y, pad_x, down, across = look
    line, run = width * channels, wide * channels
    size = height * line
    at = 0
    for image in range(images.size // size):
        for y in range(down):
            for x in range(across):
                left = (x * step_x - pad_x) * channels
                first, last = min(run, max(0, -left)), min(run, line - left)
                for i in range(y * step_y - pad_y, y * step_y - pad_y + high):
                    inside = 0 <= i < height and first < last
                    if not inside or last - first < run:
                        for j in range(uint64(run)):
                            rows[uint64(at) + j] = 0
                    if inside:
                        start = uint64(image * size + i * line + left + first)
                        for j in range(uint64(last - first)):
                            rows[uint64(at + first) + j] = images[start + j]
                    at += run


@compiled(_LAY, fastmath=set())
def lay_columns(images: Floats, columns: Floats, look: Look) -> None:
    """What `lay_rows` does with rows and columns exchanged, in longer runs where rows are short.

    Args:
        images: ``(N, H, W, C)``, flat.
        columns: ``(N, F, results)``, flat, to be filled.
        look: From `look_of`.
    """
    height, width, channels, high, wide, step_y, step_x, pad_y, pad_x, down, across = look
    line, size = width * channels, height * width * channels
    if pad_y or pad_x:
        columns[:] = 0
    to = 0
    for image in range(images.size // size):
        for i in range(high):
            for j in range(wide):
                first = max(0, -((j - pad_x) // step_x))
                last = min(across, (width - 1 + pad_x - j) // step_x + 1)
                for channel in range(channels):
                    for y in range(down):
                        down_at = y * step_y - pad_y + i
                        if 0 <= down_at < height:
                            start = image * size + down_at * line + (j - pad_x) * channels + channel
                            for x in range(first, last):
                                columns[uint64(to + x)] = images[
                                    uint64(start + x * step_x * channels)
                                ]
                        to += across


@compiled(_LAY, fastmath=set())
def fold_rows(rows: Floats, images: Floats, look: Look) -> None:
    """The way back of `lay_rows`: each number of an image gets the sum over the rows it stands in.

    Args:
        rows: ``(N * results, F)``, flat.
        images: ``(N, H, W, C)``, flat, to be filled.
        look: From `look_of`.
    """
    height, width, channels, high, wide, step_y, step_x, pad_y, pad_x, down, across = look
    line, run = width * channels, wide * channels
    size = height * line
    images[:] = 0
    at = 0
    for image in range(images.size // size):
        for y in range(down):
            for x in range(across):
                left = (x * step_x - pad_x) * channels
                first, last = max(0, -left), min(run, line - left)
                for i in range(y * step_y - pad_y, y * step_y - pad_y + high):
                    if 0 <= i < height and first < last:
                        start = uint64(image * size + i * line + left + first)
                        for j in range(uint64(last - first)):
                            images[start + j] += rows[uint64(at + first) + j]
                    at += run


@compiled(
    "void(float32[:, ::1], float32[:, ::1], float32[:, ::1], uint8[:, ::1], "
    "UniTuple(int64, 4), boolean)",
    fastmath=set(),
)
def pool(
    products: Floats, biases: Floats, found: Floats, places: Bytes, blocks: Blocks, relu: bool
) -> None:
    """The largest of each block and its bias, through ReLU if asked for; what is no number stays.

    Args:
        products: ``(N * results, out)``.
        biases: ``(K, out)``; K divides N.
        found: ``(N * blocks, out)``, to be filled.
        places: The same, to be filled: which of its block it is, the first where several are.
        blocks: From `blocks_of`.
        relu: Whether one follows.
    """
    down, across, high, wide = blocks
    outs, width = products.shape[1], across * wide
    images = found.shape[0] // (down * across)
    each = images // biases.shape[0]
    to = 0
    for image in range(images):
        client = image // each
        for y in range(image * down * high, (image + 1) * down * high, high):
            for x in range(0, width, wide):
                at = y * width + x
                # True for what is no number, too: once found, it stays. No jumps, for vectors.
                if high * wide == 4:  # as usual, and a loop of known length is unrolled
                    for o in range(outs):
                        largest, which = products[at, o], np.uint8(0)
                        for place in range(1, 4):
                            value = products[at + place // wide * width + place % wide, o]
                            more = (value > largest) | (value != value)
                            largest = value if more else largest
                            which = np.uint8(place) if more else which
                        found[to, o], places[to, o] = largest, which
                else:
                    for o in range(outs):
                        found[to, o], places[to, o] = products[at, o], 0
                    for place in range(1, high * wide):
                        row = at + place // wide * width + place % wide
                        for o in range(outs):
                            value, largest = products[row, o], found[to, o]
                            more = (value > largest) | (value != value)
                            found[to, o] = value if more else largest
                            places[to, o] = np.uint8(place) if more else places[to, o]
                for o in range(outs):
                    value = found[to, o] + biases[client, o]
                    off = relu & (value <= 0)
                    found[to, o] = np.float32(0) if off else value
                    places[to, o] = np.uint8(OFF) if off else places[to, o]
                to += 1


@compiled(
    "void(float32[:, ::1], uint8[:, ::1], float32[:, ::1], float32[:, ::1], UniTuple(int64, 4))",
    fastmath=set(),
)
def unpool(slopes: Floats, places: Bytes, products: Floats, biases: Floats, blocks: Blocks) -> None:
    """The way back of `pool`.

    Args:
        slopes: Of what it found, ``(N * blocks, out)``.
        places: From it.
        products: ``(N * results, out)``, to be filled with slopes.
        biases: ``(N, out)``, to be filled with the slopes of each image's bias.
        blocks: From `blocks_of`.
    """
    down, across, high, wide = blocks
    outs, width = products.shape[1], across * wide
    biases[:] = 0
    at = 0
    for image in range(biases.shape[0]):
        for y in range(image * down * high, (image + 1) * down * high, high):
            for x in range(0, width, wide):
                for place in range(high * wide):
                    row = y * width + x + place // wide * width + place % wide
                    for o in range(outs):
                        here = places[at, o] == place
                        products[row, o] = slopes[at, o] if here else np.float32(0)
                for o in range(outs):
                    off = places[at, o] == OFF
                    biases[image, o] += np.float32(0) if off else slopes[at, o]
                at += 1
