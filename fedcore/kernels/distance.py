"""A compiled loop that measures a vector in one pass: its peak, and its squared distance.

Importing this module compiles the loop, which takes about a second the first time.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import types
from numpy.typing import NDArray

from fedcore.kernels.compiled import compiled, read_only
from fedcore.kernels.llvm import FLOAT, Builder, Value, constant, counted, emitter, load, memory

_LANES = 8
_BLOCK = 128  # elements that NumPy sums without dividing them further
_DEPTH = 64
_DOUBLES, _FLOATS, _BITS = (
    ir.VectorType(kind, _LANES) for kind in (ir.DoubleType(), FLOAT, ir.IntType(32))
)


class SquaredDistance:
    """Squared distances of vectors, with the bits of NumPy's ``square(one - other).sum()``.

    NumPy adds pairwise: it halves a vector until 128 elements are left, and sums these in eight
    lanes. So the bits depend neither on the processor nor on a library's threads.
    """

    def __init__(self) -> None:
        """Allocates the memory for partial results; a thread needs its own object."""
        self._peaks = np.empty(_LANES, np.float32)
        self._sums = np.empty(_DEPTH, np.float64)

    def measure(self, one: NDArray[np.float32], other: NDArray[np.float32]) -> tuple[float, float]:
        """Returns the squared L2 distance of two vectors, and the largest magnitude in ``one``.

        Differences are rounded to float32; their squares and sums are float64. If the distance is
        not finite, the magnitude is meaningless: a value may be NaN.
        """
        blocks, sums = _halved(len(one))
        found = _measure(one, other, blocks, sums, self._sums, self._peaks)
        return found, float(self._peaks.max())


@lru_cache(maxsize=16)
def _halved(count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Returns the lengths of the blocks that NumPy divides a vector into to sum it.

    And for each block how many of the partial sums before it are added up once it is summed.
    """
    if count <= _BLOCK:
        return np.array([count]), np.array([0])
    half = count // 2 // _LANES * _LANES
    (one, before), (other, after) = _halved(half), _halved(count - half)
    joined = np.concatenate([before, after])
    joined[-1] += 1
    return np.concatenate([one, other]), joined


@emitter
def _add_block(
    typing: Any, one: Any, other: Any, at: Any, count: Any, peaks: Any
) -> tuple[Any, Any]:
    def write(context: Any, builder: Builder, signature: Any, arguments: Any) -> Value:
        one, other, at, count, peaks = arguments
        total = memory(builder, ir.Constant(_DOUBLES, [0.0] * _LANES))
        peak = memory(builder, load(builder, FLOAT, peaks, constant(0), _LANES))
        unsigned = ir.Constant(_BITS, [0x7FFFFFFF] * _LANES)
        with counted(builder, builder.sdiv(count, constant(_LANES))) as loop:
            place = builder.add(at, builder.mul(loop.index, constant(_LANES)))
            values = load(builder, FLOAT, one, place, _LANES)
            gap = builder.fsub(values, load(builder, FLOAT, other, place, _LANES))
            wide = builder.fpext(gap, _DOUBLES)
            builder.store(builder.fadd(builder.load(total), builder.fmul(wide, wide)), total)
            bits = builder.and_(builder.bitcast(values, _BITS), unsigned)
            size, before = builder.bitcast(bits, _FLOATS), builder.load(peak)
            above = builder.fcmp_ordered(">", size, before)
            builder.store(builder.select(above, size, before), peak)
        pointer = builder.inttoptr(peaks, _FLOATS.as_pointer())
        builder.store(builder.load(peak), pointer, align=4)
        lanes = builder.load(total)
        sums = [builder.extract_element(lanes, ir.IntType(32)(lane)) for lane in range(_LANES)]
        while len(sums) > 1:
            sums = [builder.fadd(*sums[place : place + 2]) for place in range(0, len(sums), 2)]
        return sums[0]

    return types.float64(one, other, at, count, peaks), write


@compiled(
    types.float64(
        read_only(types.float32),
        read_only(types.float32),
        types.int64[::1],
        types.int64[::1],
        types.float64[::1],
        types.float32[::1],
    ),
    fastmath=set(),
)
def _measure(
    one: NDArray[np.float32],
    other: NDArray[np.float32],
    blocks: NDArray[np.int64],
    joined: NDArray[np.int64],
    sums: NDArray[np.float64],
    peaks: NDArray[np.float32],
) -> float:
    """Implements `SquaredDistance.measure`; ``sums`` and ``peaks`` are overwritten."""
    peaks[:] = 0
    first, depth = 0, 0
    for block in range(blocks.shape[0]):
        last = first + blocks[block]
        total = _add_block(
            one.ctypes.data, other.ctypes.data, first, blocks[block], peaks.ctypes.data
        )
        for place in range(first + blocks[block] // 8 * 8, last):  # at the vector's end
            gap = np.float64(one[place] - other[place])
            total += gap * gap
            peaks[0] = max(peaks[0], abs(one[place]))
        sums[depth] = total
        depth += 1
        for _ in range(joined[block]):
            depth -= 1
            sums[depth - 1] += sums[depth]
        first = last
    return float(sums[0])
