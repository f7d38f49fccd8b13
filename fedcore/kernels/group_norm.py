"""Compiled loops of a group normalisation with its weight, bias and ReLU, for channels-last images.

Importing this module compiles the loops, which takes a few seconds the first time.

Shapes: ``K`` clients, ``B`` examples, ``P`` positions of an image, ``C`` channels, ``G`` groups of
adjacent channels.

Source:
    Wu and He 2018, arXiv:1803.08494.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedcore.kernels.compiled import compiled

Floats = NDArray[np.float32]

_CONTRACT = {"contract"}  # permits fused multiply-add only


@compiled(
    "void(float32[:, :, :, ::1], float32[:, ::1], float32[:, ::1], float32[:, :, :, ::1], "
    "float32[:, :, :, ::1], int64, float32, boolean)",
    fastmath=_CONTRACT,
)
def forward(
    images: Floats,
    weight: Floats,
    bias: Floats,
    result: Floats,
    moments: Floats,
    groups: int,
    eps: float,
    relu: bool,
) -> None:
    """Normalises each example's groups, scales, shifts, and applies a ReLU if wanted.

    Args:
        images: ``(K, B, P, C)``.
        weight: ``(K, C)``.
        bias: ``(K, C)``.
        result: Filled, ``(K, B, P, C)``.
        moments: Filled with each channel's group's mean and inverse deviation, ``(K, B, 2, C)``.
        groups: Number of groups; divides ``C``.
        eps: Added to the variance.
        relu: Whether a ReLU follows.
    """
    clients, batch, positions, channels = images.shape
    each = channels // groups
    count = np.float32(each * positions)
    sums, slope, start = (
        np.empty(channels, np.float32),
        np.empty(channels, np.float32),
        np.empty(channels, np.float32),
    )
    zero = np.float32(0)
    for k in range(clients):
        for b in range(batch):
            x, y, mean, inverse = images[k, b], result[k, b], moments[k, b, 0], moments[k, b, 1]
            sums[:] = zero
            for p in range(positions):
                row = x[p]
                for c in range(channels):
                    sums[c] += row[c]
            for g in range(groups):
                total = zero
                for c in range(g * each, (g + 1) * each):
                    total += sums[c]
                for c in range(g * each, (g + 1) * each):
                    mean[c] = total / count
            sums[:] = zero
            for p in range(positions):
                row = x[p]
                for c in range(channels):
                    gap = row[c] - mean[c]
                    sums[c] += gap * gap
            for g in range(groups):
                total = zero
                for c in range(g * each, (g + 1) * each):
                    total += sums[c]
                for c in range(g * each, (g + 1) * each):
                    inverse[c] = np.float32(1) / np.sqrt(total / count + eps)
            for c in range(channels):
                slope[c] = inverse[c] * weight[k, c]
                start[c] = bias[k, c]
            for p in range(positions):
                row, found = x[p], y[p]
                for c in range(channels):
                    found[c] = (row[c] - mean[c]) * slope[c] + start[c]
                if relu:
                    for c in range(channels):
                        value = found[c]
                        found[c] = zero if value <= zero else value  # NaN stays NaN


@compiled(
    "void(float32[:, :, :, ::1], float32[:, ::1], float32[:, :, :, ::1], float32[:, :, :, ::1], "
    "float32[:, :, :, ::1], float32[:, :, :, ::1], float32[:, :, :, ::1], int64, boolean)",
    fastmath=_CONTRACT,
)
def backward(
    images: Floats,
    weight: Floats,
    result: Floats,
    moments: Floats,
    grads: Floats,
    of_images: Floats,
    of_weights: Floats,
    groups: int,
    relu: bool,
) -> None:
    """Computes the backward pass of `forward`.

    Args:
        images: As given to `forward`.
        weight: As given to `forward`.
        result: From `forward`.
        moments: From `forward`.
        grads: Gradients of the result, ``(K, B, P, C)``; set to 0 where the ReLU let nothing pass.
        of_images: Filled with the images' gradients, ``(K, B, P, C)``.
        of_weights: Filled with each example's gradients of weight and bias, ``(K, B, 2, C)``.
        groups: Number of groups.
        relu: Whether a ReLU follows.
    """
    clients, batch, positions, channels = images.shape
    each = channels // groups
    count = np.float32(each * positions)
    slope, shift, pull = (
        np.empty(channels, np.float32),
        np.empty(channels, np.float32),
        np.empty(channels, np.float32),
    )
    zero = np.float32(0)
    for k in range(clients):
        for b in range(batch):
            x, y, d, found = images[k, b], result[k, b], grads[k, b], of_images[k, b]
            mean, inverse = moments[k, b, 0], moments[k, b, 1]
            of_weight, of_bias = of_weights[k, b, 0], of_weights[k, b, 1]
            of_weight[:] = zero
            of_bias[:] = zero
            for p in range(positions):
                row, back, at = x[p], d[p], y[p]
                if relu:
                    for c in range(channels):
                        back[c] = zero if at[c] <= zero else back[c]
                for c in range(channels):
                    of_bias[c] += back[c]
                for c in range(channels):
                    of_weight[c] += back[c] * (row[c] - mean[c])
            for c in range(channels):
                of_weight[c] *= inverse[c]
            for g in range(groups):
                total, turned = zero, zero
                for c in range(g * each, (g + 1) * each):
                    total += of_bias[c] * weight[k, c]
                    turned += of_weight[c] * weight[k, c]
                for c in range(g * each, (g + 1) * each):
                    slope[c] = inverse[c] * weight[k, c]
                    shift[c] = inverse[c] * total / count
                    pull[c] = inverse[c] * inverse[c] * turned / count
            for p in range(positions):
                row, back, mine = x[p], d[p], found[p]
                for c in range(channels):
                    mine[c] = back[c] * slope[c] - shift[c] - (row[c] - mean[c]) * pull[c]
