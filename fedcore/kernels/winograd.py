"""Compiled loops of a 3 x 3 convolution by Winograd's minimal filtering, F(2 x 2, 3 x 3).

A square of four results needs 16 products instead of 36. Images are read in overlapping 4 x 4
tiles. `to_tiles` transforms each tile, and `to_kernels` each kernel, to 16 numbers per channel. One
matrix product for each of the 16 parts follows, and `pool_tiles` transforms the products back to
results and pools them.

Importing this module compiles the loops, which takes some seconds the first time. Each loop runs in
the calling thread and sums in a fixed order.

Source:
    Lavin and Gray 2016, arXiv:1509.09308, section 4.1, which defines the matrices B, G and A.
"""

from __future__ import annotations

import numpy as np

from fedcore.kernels.compiled import compiled, unsigned
from fedcore.kernels.im2col import OFF, Bytes, Floats

Tiling = tuple[int, int, int, int, int]
"""Height, width and channels of an image, and its tiles down and across."""

PARTS = 16
LANE = 16448
"""Distance in numbers between consecutive parts of the 16 in the output of `to_tiles`. Not a power
of two, at which all parts would compete for the same cache lines."""
MAX_CHANNELS = 256
"""Maximum number of channels that the kernel loops' buffers fit."""
_ROOM = 272  # distance between parts, for one line of channels; no power of two, either

# Constant distances prove to LLVM that stores don't alias, which vectorisation requires.
# Unsigned indices are needed for the same purpose, see fedcore.kernels.im2col.
_D1, _D2, _D3, _D4, _D5, _D6, _D7, _D8, _D9, _D10, _D11, _D12, _D13, _D14, _D15 = (
    np.uint64(LANE * part) for part in range(1, PARTS)
)
_R1, _R2, _R3, _R4, _R5, _R6, _R7, _R8, _R9, _R10, _R11, _R12, _R13, _R14, _R15 = (
    np.uint64(_ROOM * part) for part in range(1, PARTS)
)
_FASTMATH = {"contract", "nsz"}


@compiled("void(float32[::1], float32[::1], UniTuple(int64, 5), int64, int64)", fastmath=_FASTMATH)
def to_tiles(images: Floats, tiles: Floats, tiling: Tiling, first: int, rows: int) -> None:
    """Transforms tiles d of images to B^T d B.

    Args:
        images: Shape ``(N, H, W, C)``, flat.
        tiles: Output: 16 parts, `LANE` numbers apart, each ``(rows * across, C)``.
        tiling: Geometry of each image.
        first: First row of tiles, counted over all images.
        rows: Number of rows of tiles.
    """
    height, width, channels, down, across = tiling
    line, c = unsigned(width * channels), unsigned(channels)
    at = unsigned(0)
    for row in range(first, first + rows):
        start = (row // down * height + row % down * 2) * width * channels
        for x in range(across):
            corner = unsigned(start + 2 * x * channels)
            for k in range(c):
                d = corner + k
                d00, d01, d02, d03 = images[d], images[d + c], images[d + 2 * c], images[d + 3 * c]
                d += line
                d10, d11, d12, d13 = images[d], images[d + c], images[d + 2 * c], images[d + 3 * c]
                d += line
                d20, d21, d22, d23 = images[d], images[d + c], images[d + 2 * c], images[d + 3 * c]
                d += line
                d30, d31, d32, d33 = images[d], images[d + c], images[d + 2 * c], images[d + 3 * c]
                a0, a1, a2, a3 = d00 - d20, d01 - d21, d02 - d22, d03 - d23
                b0, b1, b2, b3 = d10 + d20, d11 + d21, d12 + d22, d13 + d23
                e0, e1, e2, e3 = d20 - d10, d21 - d11, d22 - d12, d23 - d13
                f0, f1, f2, f3 = d10 - d30, d11 - d31, d12 - d32, d13 - d33
                v = at + k
                tiles[v], tiles[v + _D1], tiles[v + _D2], tiles[v + _D3] = (
                    a0 - a2, a1 + a2, a2 - a1, a1 - a3,
                )  # fmt: skip
                tiles[v + _D4], tiles[v + _D5], tiles[v + _D6], tiles[v + _D7] = (
                    b0 - b2, b1 + b2, b2 - b1, b1 - b3,
                )  # fmt: skip
                tiles[v + _D8], tiles[v + _D9], tiles[v + _D10], tiles[v + _D11] = (
                    e0 - e2, e1 + e2, e2 - e1, e1 - e3,
                )  # fmt: skip
                tiles[v + _D12], tiles[v + _D13], tiles[v + _D14], tiles[v + _D15] = (
                    f0 - f2, f1 + f2, f2 - f1, f1 - f3,
                )  # fmt: skip
            at += c


@compiled("void(float32[:, :, ::1], float32[:, :, :, ::1])", fastmath=_FASTMATH)
def to_kernels(weights: Floats, kernels: Floats) -> None:
    """Transforms kernels g to G g G^T.

    Args:
        weights: Shape ``(K, out, 9 * C)``, in the order (kernel's height, its width, channel).
        kernels: Output, ``(K, 16, out, C)``.
    """
    clients, _, outs, channels = kernels.shape
    c, half = unsigned(channels), np.float32(0.5)
    held = np.empty(PARTS * _ROOM, np.float32)
    for client in range(clients):
        for out in range(outs):
            row = weights[client, out]
            for k in range(c):
                g00, g01, g02 = row[k], row[k + c], row[k + 2 * c]
                g10, g11, g12 = row[k + 3 * c], row[k + 4 * c], row[k + 5 * c]
                g20, g21, g22 = row[k + 6 * c], row[k + 7 * c], row[k + 8 * c]
                m0, m1, m2 = g10 * half, g11 * half, g12 * half
                s0, s1, s2 = (g00 + g20) * half, (g01 + g21) * half, (g02 + g22) * half
                a0, a1, a2, b0, b1, b2 = s0 + m0, s1 + m1, s2 + m2, s0 - m0, s1 - m1, s2 - m2
                s, m = (g00 + g02) * half, g01 * half
                held[k], held[k + _R1], held[k + _R2], held[k + _R3] = g00, s + m, s - m, g02
                s, m = (a0 + a2) * half, a1 * half
                held[k + _R4], held[k + _R5], held[k + _R6], held[k + _R7] = a0, s + m, s - m, a2
                s, m = (b0 + b2) * half, b1 * half
                held[k + _R8], held[k + _R9], held[k + _R10], held[k + _R11] = b0, s + m, s - m, b2
                s, m = (g20 + g22) * half, g21 * half
                held[k + _R12], held[k + _R13], held[k + _R14], held[k + _R15] = (
                    g20, s + m, s - m, g22,
                )  # fmt: skip
            for part in range(PARTS):
                to, piece = kernels[client, part, out], held[part * _ROOM :]
                for k in range(c):
                    to[k] = piece[k]


@compiled(
    "void(float32[:, :, ::1], float32[::1], float32[:, ::1], uint8[:, ::1], boolean)",
    fastmath=_FASTMATH,
)
def pool_tiles(products: Floats, bias: Floats, found: Floats, places: Bytes, relu: bool) -> None:
    """Transforms products m to results A^T m A, and pools each tile's 2 x 2 results.

    Args:
        products: Shape ``(16, tiles, out)``.
        bias: Shape ``(out,)``.
        found: Output, ``(tiles, out)``: each tile's maximum plus bias.
        places: Output, ``(tiles, out)``: the maximum's position in its tile, in the form of
            `fedcore.kernels.im2col.pool`.
        relu: Whether a ReLU follows.
    """
    outs = unsigned(places.shape[1])
    for at in range(unsigned(places.shape[0])):
        for o in range(outs):
            m00, m01, m02, m03 = (
                products[0, at, o], products[1, at, o], products[2, at, o], products[3, at, o],
            )  # fmt: skip
            m10, m11, m12, m13 = (
                products[4, at, o], products[5, at, o], products[6, at, o], products[7, at, o],
            )  # fmt: skip
            m20, m21, m22, m23 = (
                products[8, at, o], products[9, at, o], products[10, at, o], products[11, at, o],
            )  # fmt: skip
            m30, m31, m32, m33 = (
                products[12, at, o], products[13, at, o], products[14, at, o], products[15, at, o],
            )  # fmt: skip
            a0, a1, a2, a3 = m00 + m10 + m20, m01 + m11 + m21, m02 + m12 + m22, m03 + m13 + m23
            b0, b1, b2, b3 = m10 - m20 - m30, m11 - m21 - m31, m12 - m22 - m32, m13 - m23 - m33
            largest, which = a0 + a1 + a2, np.uint8(0)
            # Also true for NaN, which then propagates.
            value = a1 - a2 - a3
            more = (value > largest) | (value != value)
            largest, which = (value if more else largest), (np.uint8(1) if more else which)
            value = b0 + b1 + b2
            more = (value > largest) | (value != value)
            largest, which = (value if more else largest), (np.uint8(2) if more else which)
            value = b1 - b2 - b3
            more = (value > largest) | (value != value)
            largest, which = (value if more else largest), (np.uint8(3) if more else which)
            value = largest + bias[o]
            off = relu & (value <= 0)
            found[at, o] = np.float32(0) if off else value
            places[at, o] = np.uint8(OFF) if off else which
