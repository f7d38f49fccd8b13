"""Population stability index: how far a distribution in bins has moved from a reference.

Source:
    Siddiqi 2006, Credit Risk Scorecards, chapter 9 (the index, and the readings at 0.1 and 0.25);
    Yurdakul, Naranjo 2020, 10.21314/JRMV.2020.227 (its distribution where nothing has moved).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

MODERATE, SHIFTED = 0.1, 0.25
Reading = Literal["stable", "moderate", "shifted"]
"""``stable`` below 0.1 or within chance, ``moderate`` to 0.25, ``shifted`` above."""
_SMOOTHING = 0.5
"""Added to each bin's count, so that an empty one has a finite logarithm."""
_CHANCE_Z = 4.0
"""Deviations of a normal number that are exceeded in 3 of 100,000 cases."""

_Pair = tuple[NDArray[np.float64], NDArray[np.float64]]


def psi(expected: Sequence[int], observed: Sequence[int]) -> float:
    """Returns the population stability index of two distributions over the same bins.

    The sum of ``(a - e) * ln(a / e)`` over bins, with ``e`` and ``a`` the shares of a bin among
    expected and observed rows. Bins that are empty on both sides are left out, and 0.5 is added to
    the counts of all others, so that a bin which is empty on one side counts, and stays finite.

    Args:
        expected: Rows in each bin of the reference.
        observed: Rows in each bin now; negative counts, which noise can give, count as zero.

    Returns:
        At least 0; 0 if one of the two has no rows.
    """
    kept_expected, kept_observed = _kept(expected, observed)
    if not kept_expected.sum() or not kept_observed.sum():
        return 0.0
    e, a = _shares(kept_expected), _shares(kept_observed)
    return float(((a - e) * np.log(a / e)).sum())


def chance(
    expected: Sequence[int], observed: Sequence[int], *, noise_deviation: float = 0.0
) -> float:
    """Returns the index that `psi` stays below where nothing has moved, in all but rare cases.

    With ``n`` rows, ``m`` rows of the reference and ``K`` bins the index is about
    ``(1/n + 1/m)`` times a chi-square number of ``K - 1`` degrees of freedom. Its quantile (all but
    3 of 100,000 cases) is that of Wilson and Hilferty's approximation.

    Args:
        expected: Rows in each bin of the reference.
        observed: Rows in each bin now.
        noise_deviation: Standard deviation of noise on each observed count.
    """
    kept_expected, kept_observed = _kept(expected, observed)
    bins, m, n = len(kept_expected), kept_expected.sum(), kept_observed.sum()
    if bins < 2 or not m or not n:
        return 0.0
    degrees = bins - 1
    root = 1 - 2 / (9 * degrees) + _CHANCE_Z * math.sqrt(2 / (9 * degrees))
    scale = 1 / n + 1 / m + bins * (noise_deviation / n) ** 2
    return float(degrees * root**3 * scale)


def reading(index: float, by_chance: float) -> Reading:
    """Returns how an index is read; one that chance alone explains is ``stable``."""
    if index < MODERATE or index <= by_chance:
        return "stable"
    return "moderate" if index <= SHIFTED else "shifted"


def _kept(expected: Sequence[int], observed: Sequence[int]) -> _Pair:
    """Returns the counts of the bins that are not empty on both sides."""
    e = np.asarray(expected, np.float64)
    a = np.maximum(np.asarray(observed, np.float64), 0)
    kept = (e > 0) | (a > 0)
    return e[kept], a[kept]


def _shares(counts: NDArray[np.float64]) -> NDArray[np.float64]:
    smoothed = counts + _SMOOTHING
    return np.asarray(smoothed / smoothed.sum())
