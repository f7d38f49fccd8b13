"""Compiled loops of a group normalisation with its weight, bias, ReLU and pooling.

They read channels-last images. What pooling drops is not stored, and its gradients, which are zero
before the normalisation, are not read.

Shapes: ``K`` clients, ``B`` examples, images of ``H`` rows, ``W`` columns and ``C`` channels, ``N``
pooling blocks of an image, ``G`` groups of adjacent channels.

Source:
    Wu and He 2018, arXiv:1803.08494.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedcore.kernels.compiled import compiled, unsigned
from fedcore.kernels.im2col import OFF, Blocks, Bytes, Floats

_CONTRACT = {"contract"}  # permits fused multiply-add only


@dataclass(frozen=True)
class GroupNorm:
    """The forward and backward loops of a group normalisation, from `compile_group_norm`."""

    forward: Callable[
        [Floats, Floats, Floats, Floats, Bytes, Floats, int, float, Blocks, bool], None
    ]
    """Forward loop. Reads images ``(K, B, H, W, C)``, weights and biases ``(K, C)``. Fills pooled
    results ``(K, B, N, C)``; the maxima's positions in their blocks, of that shape, in the form of
    `fedcore.kernels.im2col.pool`; and the mean and inverse deviation of each channel's group,
    ``(K, B, 2, C)``. Then: groups, the number added to the variance, blocks, whether a ReLU
    follows."""
    backward: Callable[[Floats, Floats, Bytes, Floats, Floats, Floats, Floats, int, Blocks], None]
    """Backward loop. Reads images and weights as given to ``forward``, its positions and moments,
    and gradients of the pooled results. Fills the gradients of images, and of each example's weight
    and bias, ``(K, B, 2, C)``. Then: groups, blocks."""


@functools.cache
def compile_group_norm(channels: int, high: int, wide: int) -> GroupNorm:
    """Compiles the loops for images of so many channels.

    The first call takes some seconds. Lengths that are known let the inner loops, over channels,
    use whole vectors.

    Args:
        channels: Channels of the images.
        high: Height of a pooling block; 1 without pooling.
        wide: Its width.
    """
    return GroupNorm(_forward(channels, high, wide), _backward(channels, high, wide))


def _forward(channels: int, high: int, wide: int) -> Callable[..., None]:
    size, off = high * wide, np.uint8(OFF)
    find_moments = _moments(channels)

    @compiled(
        "void(float32[:, :, :, :, ::1], float32[:, ::1], float32[:, ::1], float32[:, :, :, ::1], "
        "uint8[:, :, :, ::1], float32[:, :, :, ::1], int64, float32, UniTuple(int64, 4), boolean)",
        fastmath=_CONTRACT,
        shape=(channels, high, wide),
    )
    def forward(
        images: Floats,
        weight: Floats,
        bias: Floats,
        result: Floats,
        places: Bytes,
        moments: Floats,
        groups: int,
        eps: float,
        blocks: Blocks,
        relu: bool,
    ) -> None:
        clients, batch, _, width, _ = images.shape
        down, across = blocks[0], blocks[1]
        slope = np.empty(channels, np.float32)
        for k in range(clients):
            for b in range(batch):
                x, found, place = images[k, b].reshape(-1, channels), result[k, b], places[k, b]
                mean, inverse, start = moments[k, b, 0], moments[k, b, 1], bias[k]
                find_moments(x, mean, inverse, groups, eps)
                for c in range(channels):
                    slope[c] = inverse[c] * weight[k, c]
                for to in range(unsigned(down * across)):
                    row = to // unsigned(across) * unsigned(high * width)
                    row += to % unsigned(across) * unsigned(wide)
                    for c in range(channels):
                        largest, which = (x[row, c] - mean[c]) * slope[c] + start[c], np.uint8(0)
                        for q in range(1, size):  # true for NaN, too, which then propagates
                            at = row + unsigned(q // wide * width + q % wide)
                            value = (x[at, c] - mean[c]) * slope[c] + start[c]
                            more = (value > largest) | (value != value)
                            largest = value if more else largest
                            which = np.uint8(q) if more else which
                        zero = relu & (largest <= 0)
                        found[to, c] = np.float32(0) if zero else largest
                        place[to, c] = off if zero else which

    return forward


def _moments(channels: int) -> Callable[..., None]:
    """Compiles the mean and inverse deviation of one image's groups."""

    @compiled(
        "void(float32[:, ::1], float32[::1], float32[::1], int64, float32)",
        fastmath=_CONTRACT,
        shape=channels,
    )
    def moments(x: Floats, mean: Floats, inverse: Floats, groups: int, eps: float) -> None:
        each, count = channels // groups, np.float32(channels // groups * len(x))
        four = unsigned(len(x) // 4 * 4)
        sums = np.zeros(channels, np.float32)
        for p in range(unsigned(0), four, unsigned(4)):  # so that sums are stored less often
            a, b, c, d = x[p], x[p + unsigned(1)], x[p + unsigned(2)], x[p + unsigned(3)]
            for i in range(channels):
                sums[i] += (a[i] + b[i]) + (c[i] + d[i])
        for p in range(four, unsigned(len(x))):
            for i in range(channels):
                sums[i] += x[p, i]
        _mean_of_groups(sums, each, count)
        mean[:] = sums
        sums[:] = 0
        for p in range(unsigned(0), four, unsigned(4)):
            a, b, c, d = x[p], x[p + unsigned(1)], x[p + unsigned(2)], x[p + unsigned(3)]
            for i in range(channels):
                u, v, w, z = a[i] - mean[i], b[i] - mean[i], c[i] - mean[i], d[i] - mean[i]
                sums[i] += (u * u + v * v) + (w * w + z * z)
        for p in range(four, unsigned(len(x))):
            for i in range(channels):
                sums[i] += (x[p, i] - mean[i]) * (x[p, i] - mean[i])
        _mean_of_groups(sums, each, count)
        for i in range(channels):
            inverse[i] = np.float32(1) / np.sqrt(sums[i] + eps)

    return moments


@compiled("void(float32[::1], int64, float32)", fastmath=_CONTRACT)
def _mean_of_groups(sums: NDArray[np.float32], each: int, count: np.float32) -> None:
    """Replaces the sums of ``each`` adjacent channels by their common mean over ``count``."""
    for first in range(0, len(sums), each):
        total = np.float32(0)
        for c in range(first, first + each):
            total += sums[c]
        for c in range(first, first + each):
            sums[c] = total / count


def _backward(channels: int, high: int, wide: int) -> Callable[..., None]:
    add_up, spread = _sums(channels, high, wide), _spread(channels, high, wide)

    @compiled(
        "void(float32[:, :, :, :, ::1], float32[:, ::1], uint8[:, :, :, ::1], "
        "float32[:, :, :, ::1], float32[:, :, :, ::1], float32[:, :, :, :, ::1], "
        "float32[:, :, :, ::1], int64, UniTuple(int64, 4))",
        fastmath=_CONTRACT,
        shape=(channels, high, wide),
    )
    def backward(
        images: Floats,
        weight: Floats,
        places: Bytes,
        moments: Floats,
        grads: Floats,
        of_images: Floats,
        of_weights: Floats,
        groups: int,
        blocks: Blocks,
    ) -> None:
        clients, batch, height, width, _ = images.shape
        each = channels // groups
        count = np.float32(each * height * width)
        slope, shift = np.empty(channels, np.float32), np.empty(channels, np.float32)
        pull = np.empty(channels, np.float32)
        for k in range(clients):
            for b in range(batch):
                x, found = images[k, b].reshape(-1, channels), of_images[k, b].reshape(-1, channels)
                mean, inverse = moments[k, b, 0], moments[k, b, 1]
                of_weight, of_bias = of_weights[k, b, 0], of_weights[k, b, 1]
                add_up(x, places[k, b], grads[k, b], mean, of_weight, of_bias, width, blocks)
                for c in range(channels):
                    of_weight[c] *= inverse[c]
                    slope[c] = inverse[c] * weight[k, c]
                    shift[c] = of_bias[c] * weight[k, c]
                    pull[c] = of_weight[c] * weight[k, c]
                _mean_of_groups(shift, each, count)
                _mean_of_groups(pull, each, count)
                for c in range(channels):
                    shift[c] *= inverse[c]
                    pull[c] *= inverse[c] * inverse[c]
                for p in range(unsigned(height * width)):
                    for c in range(channels):
                        found[p, c] = -shift[c] - (x[p, c] - mean[c]) * pull[c]
                spread(found, places[k, b], grads[k, b], slope, width, blocks)

    return backward


def _sums(channels: int, high: int, wide: int) -> Callable[..., None]:
    """Compiles the sums of one image's gradients, and of those times what they belong to."""
    size, off = high * wide, np.uint8(OFF)

    @compiled(
        "void(float32[:, ::1], uint8[:, ::1], float32[:, ::1], float32[::1], float32[::1], "
        "float32[::1], int64, UniTuple(int64, 4))",
        fastmath=_CONTRACT,
        shape=(channels, high, wide),
    )
    def sums(
        x: Floats,
        places: Bytes,
        grads: Floats,
        mean: Floats,
        of_weight: Floats,
        of_bias: Floats,
        width: int,
        blocks: Blocks,
    ) -> None:
        down, across = unsigned(blocks[0]), unsigned(blocks[1])
        of_weight[:] = 0
        of_bias[:] = 0
        for to in range(down * across):
            row = to // across * unsigned(high * width) + to % across * unsigned(wide)
            place, given = places[to], grads[to]
            for c in range(channels):
                value, which, grad = x[row, c], place[c], given[c]
                for q in range(1, size):
                    other = x[row + unsigned(q // wide * width + q % wide), c]  # read in any case
                    value = other if which == q else value
                grad = np.float32(0) if which == off else grad
                of_bias[c] += grad
                of_weight[c] += grad * (value - mean[c])

    return sums


def _spread(channels: int, high: int, wide: int) -> Callable[..., None]:
    """Compiles the addition of one image's gradients, times a slope, where the maxima were."""
    size = high * wide

    @compiled(
        "void(float32[:, ::1], uint8[:, ::1], float32[:, ::1], float32[::1], int64, "
        "UniTuple(int64, 4))",
        fastmath=_CONTRACT,
        shape=(channels, high, wide),
    )
    def spread(
        found: Floats, places: Bytes, grads: Floats, slope: Floats, width: int, blocks: Blocks
    ) -> None:
        down, across = unsigned(blocks[0]), unsigned(blocks[1])
        for to in range(down * across):
            row = to // across * unsigned(high * width) + to % across * unsigned(wide)
            place, given = places[to], grads[to]
            for q in range(size):
                one = found[row + unsigned(q // wide * width + q % wide)]
                for c in range(channels):
                    grad = given[c] * slope[c]
                    one[c] += grad if place[c] == q else np.float32(0)

    return spread
