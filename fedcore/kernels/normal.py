"""A compiled loop that adds normal noise, rounded to a grid, from uniform random words.

Uses the Box-Muller transform: a pair of words gives an angle and a radius, and these give two
normal numbers. Logarithm, sine and cosine are polynomials, so that the loop vectorises. Each is
accurate to two units in the last place of float64.

Importing this module compiles the loop, which takes about a second the first time.

Source:
    Box and Muller 1958; the polynomials are those of FDLIBM (Sun Microsystems 1993): e_log.c,
    k_sin.c, k_cos.c.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic
from numpy.typing import NDArray

from fedcore.kernels.compiled import compiled, unsigned

_TO_UNIT = 2.0**-63
_TO_ANGLE = math.pi * _TO_UNIT
_ROOT_OF_HALF = np.uint64(0x3FE6A09E667F3BCD)  # the bits of 0.5 ** 0.5, as a float64
_LN2_HIGH, _LN2_LOW = 6.93147180369123816490e-01, 1.90821492927058770002e-10
_L1, _L2, _L3, _L4, _L5, _L6, _L7 = (
    6.666666666666735130e-01,
    3.999999999940941908e-01,
    2.857142874366239149e-01,
    2.222219843214978396e-01,
    1.818357216161805012e-01,
    1.531383769920937332e-01,
    1.479819860511658591e-01,
)
_S1, _S2, _S3, _S4, _S5, _S6 = (
    -1.66666666666666324348e-01,
    8.33333333332248946124e-03,
    -1.98412698298579493134e-04,
    2.75573137070700676789e-06,
    -2.50507602534068634195e-08,
    1.58969099521155010221e-10,
)
_C1, _C2, _C3, _C4, _C5, _C6 = (
    4.16666666666666019037e-02,
    -1.38888888888741095749e-03,
    2.48015872894767294178e-05,
    -2.75573143513906633035e-07,
    2.08757232129817482790e-09,
    -1.13596475577881948265e-11,
)


def _bitcast(source: Any, target: Any, kind: Any) -> Any:
    """Returns a function that reinterprets the bits of one number type as another type."""

    @intrinsic
    def read(typing: Any, value: Any) -> Any:
        def write(context: Any, builder: Any, _: Any, args: Any) -> Any:
            return builder.bitcast(args[0], kind)

        return target(source), write

    return read


_bits = _bitcast(types.float64, types.uint64, ir.IntType(64))
_number = _bitcast(types.uint64, types.float64, ir.DoubleType())


@compiled(
    "void(uint64[::1], uint64[::1], float64[::1], float64[::1], float64, float64)",
    fastmath={"contract"},  # permits fused multiply-add only
)
def add_normals(
    angles: NDArray[np.uint64],
    radii: NDArray[np.uint64],
    first: NDArray[np.float64],
    second: NDArray[np.float64],
    deviation: float,
    shift: float,
) -> None:
    """Adds independent normal numbers of mean 0, all on a grid, in place.

    Args:
        angles: Uniform words, ``(N,)``.
        radii: Uniform words, ``(N,)``; the highest bit is ignored.
        first: Sums, ``(N,)``; each is rounded to the grid before a number on the grid is added.
        second: Further sums, ``(N,)`` or ``(N - 1,)``.
        deviation: Standard deviation of the numbers.
        shift: A number at which float64's spacing is the grid's step; sums and noise must be below
            a third of it.
    """
    scale = -2.0 * deviation * deviation
    for at in range(unsigned(first.shape[0])):
        # A uniform number in (0, 1], as 2**k * m with m near 1, for its logarithm.
        size = np.int64(radii[at] & np.uint64(0x7FFFFFFFFFFFFFFF))
        bits = _bits(np.float64(size) * _TO_UNIT + _TO_UNIT / 2)
        above = (bits - _ROOT_OF_HALF) & np.uint64(0xFFF0000000000000)
        k = np.float64(np.int64(above) >> np.int64(52))
        f = _number(bits - above) - 1.0
        s = f / (2.0 + f)
        z = s * s
        r = z * (_L1 + z * (_L2 + z * (_L3 + z * (_L4 + z * (_L5 + z * (_L6 + z * _L7))))))
        half = 0.5 * f * f
        log = k * _LN2_HIGH - ((half - (s * (half + r) + k * _LN2_LOW)) - f)
        radius = math.sqrt(scale * log)
        # The angle as quarter turns plus a remainder of at most an eighth of a turn.
        word = angles[at]
        quarter = (word + np.uint64(1 << 61)) >> np.uint64(62)
        x = np.float64(np.int64(word - (quarter << np.uint64(62)))) * _TO_ANGLE
        z = x * x
        sine = x + x * z * (_S1 + z * (_S2 + z * (_S3 + z * (_S4 + z * (_S5 + z * _S6)))))
        high = _C1 + z * (_C2 + z * (_C3 + z * (_C4 + z * (_C5 + z * _C6))))
        cosine = 1.0 - 0.5 * z + z * z * high
        turned = (quarter & np.uint64(1)) != 0
        one, other = (sine if turned else cosine), (cosine if turned else sine)
        one = -one if ((quarter + np.uint64(1)) & np.uint64(2)) != 0 else one
        other = -other if (quarter & np.uint64(2)) != 0 else other
        first[at] = (first[at] + shift) + (one * radius - shift)
        if at < unsigned(second.shape[0]):
            second[at] = (second[at] + shift) + (other * radius - shift)
