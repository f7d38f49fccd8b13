"""Gaussian noise on counts of what a device serves. Needs neither torch nor SciPy.

Unit of privacy:
    One row that was served. Neighbouring windows have a null record in its place, which adds to no
    count (zero-out adjacency), so the number of rows is public. A row is in one window, and adds
    one to one count of each feature: the L2 sensitivity of all counts is the root of the number of
    features. A row that is asked again is another row, whose epsilon adds.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence

import numpy as np


def count_deviation(features: int, *, epsilon: float, target_delta: float) -> float:
    """Returns the standard deviation of the noise on each count.

    Guarantee:
        Counts with this noise are (``epsilon``, ``target_delta``)-differentially private for one
        row of the window.

    Args:
        features: Features that a row is counted in, one bin of each.
        epsilon: Epsilon of one row.
        target_delta: The delta of ``epsilon``.

    Source:
        Bun, Steinke 2016, arXiv:1605.02658, propositions 1.3 and 1.6 (concentrated privacy of the
        Gaussian mechanism, and what it means in epsilon and delta).
    """
    log = math.log(1 / target_delta)
    rho = (epsilon / (math.sqrt(log + epsilon) + math.sqrt(log))) ** 2
    return math.sqrt(features / (2 * rho))


def noised_counts(
    counts: Sequence[Sequence[int]],
    *,
    deviation: float,
    entropy: Callable[[int], bytes] = os.urandom,
) -> tuple[tuple[int, ...], ...]:
    """Returns counts with independent Gaussian noise, rounded to whole numbers.

    Guarantee:
        The rounded sum of a whole number and a Gaussian one is the whole number plus the rounded
        Gaussian one, so the noise that is added does not depend on the counts, in no bit of it.

    Args:
        counts: Rows in each bin of each feature.
        deviation: Standard deviation before rounding.
        entropy: Returns so many random bytes; the operating system's on a device.
    """
    total = sum(map(len, counts))
    pairs = (total + 1) // 2
    words = np.frombuffer(entropy(16 * pairs), np.uint64) >> np.uint64(11)
    uniform = (words.astype(np.float64) + 0.5) * 2.0**-53  # never 0
    radius, angle = np.sqrt(-2 * np.log(uniform[:pairs])), 2 * np.pi * uniform[pairs:]
    normal = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:total]
    noise = iter(np.rint(deviation * normal).astype(np.int64).tolist())
    return tuple(tuple(count + next(noise) for count in row) for row in counts)
