"""Outlier detection for the numbers that clients report."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

MIN_CLIENTS = 3
"""Smallest number of clients among which an outlier can be identified."""
MAX_SPREADS = 30.0
"""Distance from the median, in spreads, beyond which a value is an outlier. No honest client of
a federation has been observed beyond it."""

DOMINATES = 3.0
"""A client that moves a mean by this many times the usual magnitude determines it by itself."""


def outlying(values: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Returns which rows have a value that is an outlier in its column.

    A column's centre is its median. Its spread is the median distance to the centre plus a tenth of
    the centre's magnitude. Both are robust while fewer than half of the rows are false. Where the
    spread is zero, most values are zero, and no other value counts as an outlier.

    Args:
        values: Shape ``(N, D)``, finite.

    Returns:
        Shape ``(N,)``; all False where ``N`` is less than `MIN_CLIENTS`.
    """
    if len(values) < MIN_CLIENTS:
        return np.zeros(len(values), np.bool_)
    middle = np.median(values, axis=0)
    away = np.abs(values - middle)
    spread = np.median(away, axis=0) + 0.1 * np.abs(middle)
    far = np.logical_and(away > MAX_SPREADS * spread, spread > 0)
    found: NDArray[np.bool_] = np.any(far, axis=1)
    return found
