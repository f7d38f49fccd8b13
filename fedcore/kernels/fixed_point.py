"""Exact fixed-point sums of many updates, by a compiled loop that reads each number once."""

from __future__ import annotations

import numpy as np
from numba.core import types
from numpy.typing import NDArray

from fedcore.kernels.compiled import compiled, read_only, unsigned

_PART = 4096  # entries of a total that fit into a core's L1 cache


@compiled(
    types.void(read_only(types.float32, 2), types.float64[::1], types.int64[::1]), fastmath=set()
)
def add_scaled(
    rows: NDArray[np.float32], factors: NDArray[np.float64], total: NDArray[np.int64]
) -> None:
    """Adds rows, each times its factor and rounded, to a total; bit-identical to NumPy's result.

    Implements `AddScaled` of `server.rounds.aggregation.exact_mean`.

    Args:
        rows: Shape ``(N, D)``.
        factors: Shape ``(N,)``.
        total: Shape ``(D,)``, changed in place.
    """
    for first in range(0, rows.shape[1], _PART):
        last = min(rows.shape[1], first + _PART)
        for row in range(rows.shape[0]):
            for place in range(unsigned(first), unsigned(last)):
                total[place] += np.int64(np.rint(np.float64(rows[row, place]) * factors[row]))
