"""Compiled loops of a convolution: its input patches (im2col), its pooling, and their gradients.

Importing this module compiles the loops, which takes some seconds the first time. Each loop runs in
the calling thread and sums in a fixed order.

In all shapes, ``N`` images have ``H`` rows, ``W`` columns and ``C`` channels, and a patch has ``F``
numbers in the order (kernel's height, its width, channel).
"""

from __future__ import annotations

import numpy as np
from numba import uint64
from numpy.typing import NDArray

from fedcore.kernels.compiled import compiled
from fedcore.kernels.window import ConvolutionWindow

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]
Geometry = tuple[int, int, int, int, int, int, int, int, int, int, int]
"""Height, width and channels of an image; the kernel's height and width, stride and padding, each
down and across; results down and across, limited to whole pooling blocks."""
Blocks = tuple[int, int, int, int]
"""Blocks down and across, and the height and width of each."""

MAX_WINDOW = 254
"""Maximum number of results in a block: a byte must distinguish them, and `OFF`."""
OFF = 255
"""Position of a block's maximum where a ReLU follows and the value is at most 0."""


def conv_geometry(window: ConvolutionWindow, height: int, width: int, channels: int) -> Geometry:
    """Returns the convolution's geometry for images of this size, as the kernels need it."""
    down, across = window.cells(height, width)
    results = down * window.pool[0], across * window.pool[1]
    return (height, width, channels, *window.kernel, *window.stride, *window.padding, *results)


def blocks_of(window: ConvolutionWindow, height: int, width: int) -> Blocks:
    """Returns the pooling's geometry for images of this size, as the kernels need it."""
    return *window.cells(height, width), *window.pool


# Innermost loops use unsigned indices: numba tests signed ones for negative values, which
# prevents vectorisation.
_LAY = "void(float32[::1], float32[::1], UniTuple(int64, 11))"


@compiled(_LAY, fastmath=set())
def im2col_rows(images: Floats, rows: Floats, geometry: Geometry) -> None:
    """Writes a convolution's input patches as rows, one per result, in the order of the image.

    Args:
        images: Shape ``(N, H, W, C)``, flat.
        rows: Output, ``(N * results, F)``, flat; each row in the order (kernel's height, its width,
            channel).
        geometry: From `conv_geometry`.
    """
    height, width, channels, high, wide, step_y, step_x, pad_y, pad_x, down, across = geometry
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
def im2col_columns(images: Floats, columns: Floats, geometry: Geometry) -> None:
    """Writes a convolution's input patches as columns, in longer runs where rows would be short.

    Args:
        images: Shape ``(N, H, W, C)``, flat.
        columns: Output, ``(N, F, results)``, flat: the transpose of the rows of `im2col_rows`.
        geometry: From `conv_geometry`.
    """
    height, width, channels, high, wide, step_y, step_x, pad_y, pad_x, down, across = geometry
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
def col2im(rows: Floats, images: Floats, geometry: Geometry) -> None:
    """Computes image gradients from patch gradients: the backward pass of `im2col_rows`.

    Args:
        rows: Patch gradients, ``(N * results, F)``, flat.
        images: Output, ``(N, H, W, C)``, flat: for each number the sum over all patches with it.
        geometry: From `conv_geometry`.
    """
    height, width, channels, high, wide, step_y, step_x, pad_y, pad_x, down, across = geometry
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
    """Writes each block's maximum plus bias, through a ReLU if requested; NaN propagates.

    Args:
        products: Convolution results, ``(N * results, out)``.
        biases: Shape ``(K, out)``; K divides N.
        found: Output, ``(N * blocks, out)``.
        places: Output, ``(N * blocks, out)``: the maximum's position in its block, the first one
            for ties, or `OFF` where the ReLU gives 0.
        blocks: From `blocks_of`.
        relu: Whether a ReLU follows.
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
                # Also true for NaN, which then propagates. No branches, for vectorisation.
                if high * wide == 4:  # the usual case; constant length allows unrolling
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
def unpool(grads: Floats, places: Bytes, products: Floats, biases: Floats, blocks: Blocks) -> None:
    """Computes the gradients of convolution results and biases: the backward pass of `pool`.

    Args:
        grads: Gradients of the pooled results, ``(N * blocks, out)``.
        places: From `pool`.
        products: Output, ``(N * results, out)``: gradients of the convolution results.
        biases: Output, ``(N, out)``: gradients of each image's bias.
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
                        products[row, o] = grads[at, o] if here else np.float32(0)
                for o in range(outs):
                    off = places[at, o] == OFF
                    biases[image, o] += np.float32(0) if off else grads[at, o]
                at += 1
