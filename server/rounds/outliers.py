"""Which of several numbers that clients report lies far from all others."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

LEAST = 3
"""Among fewer nobody can tell who is wrong."""
FAR = 30.0
"""So many spreads from the median are far: no honest client of a federation was seen there."""

DECIDES = 3.0
"""Whoever moves a mean by so many times what is usual decides it alone."""


def outlying(values: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Which rows hold a number far from those of the same column; all finite.

    The middle of a column is its median, its spread the median distance to that plus a tenth of
    its magnitude: neither moves far while fewer than half of the rows are made up. Where the spread
    is zero, most agree on zero, and nobody is called outlying for having something else.

    Args:
        values: Shape ``(N, D)``.

    Returns:
        Shape ``(N,)``; all False where ``N`` is less than `LEAST`.
    """
    if len(values) < LEAST:
        return np.zeros(len(values), np.bool_)
    middle = np.median(values, axis=0)
    away = np.abs(values - middle)
    spread = np.median(away, axis=0) + 0.1 * np.abs(middle)
    far = np.logical_and(away > FAR * spread, spread > 0)
    found: NDArray[np.bool_] = np.any(far, axis=1)
    return found
