"""The matrix mechanism: noise correlated over rounds, so that much of it cancels in running sums.

A sum grows by one vector per round, and each prefix is released. Independent noise on every vector
accumulates; the matrix mechanism adds ``C^-1 z`` instead, where ``z`` is independent noise and
``C`` a lower triangular matrix, and is as private as releasing ``C g + z``. ``C`` here is a banded
Toeplitz matrix, fully determined by its first column. Each round's noise subtracts part of the
noise of earlier rounds, up to the number of bands less one.

Source:
    Choquette-Choo et al. 2023, arXiv:2306.08153 (banded factors, sensitivity under participation
    with minimum separation); Fichtenberger, Henzinger, Upadhyay 2023, arXiv:2202.11205 (the square
    root of the matrix of prefix sums); Kalinin, Lampert 2024, arXiv:2405.13763 (its bands).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
_MAX_BANDS = 64  # each stores one noise vector of the model's size


@dataclass(frozen=True)
class Factor:
    """A banded Toeplitz matrix ``C``, given by the nonzero entries of its first column."""

    column: tuple[float, ...]
    """The nonzero entries from the diagonal down; the first is 1."""

    @property
    def norm(self) -> float:
        """The L2 norm of a column; an upper bound for the last columns, which are cut off."""
        return math.sqrt(math.fsum(entry * entry for entry in self.column))

    def sensitivity(self, participations: int) -> float:
        """Returns how far omitting one client, with vectors of norm at most 1, moves ``C g``.

        Guarantee:
            Valid if any two rounds of one client are at least as far apart as there are bands: its
            columns then have no row in common, and their squared norms add up.
        """
        return math.sqrt(participations) * self.norm

    def error(self, rounds: int) -> float:
        """Returns the last prefix sum's noise deviation, for ``z`` of standard deviation 1."""
        return float(np.linalg.norm(self._inverse_sums(rounds)))

    def correlated(self, fresh: Floats, before: Sequence[Floats]) -> Floats:
        """Returns the entry of ``C^-1 z`` for one round.

        Args:
            fresh: ``z`` of this round.
            before: Results of this method in earlier rounds, the latest last; only the last
                ``len(column) - 1`` are used.
        """
        return fresh - self.carried(len(fresh), before)

    def carried(self, size: int, before: Sequence[Floats]) -> Floats:
        """Returns the noise of earlier rounds to subtract in this one."""
        total = np.zeros(size)
        for entry, noise in zip(self.column[1:], reversed(before), strict=False):
            total += entry * noise
        return total

    def _inverse_sums(self, rounds: int) -> Floats:
        """Returns the first column of ``A C^-1``, where ``A`` is the matrix of prefix sums."""
        column = np.array(self.column)
        inverse = np.zeros(rounds)
        for row in range(rounds):
            seen = inverse[max(0, row - len(column) + 1) : row][::-1]
            inverse[row] = (row == 0) - float(column[1 : 1 + len(seen)] @ seen)
        return np.cumsum(inverse)


def square_root(bands: int) -> Factor:
    """Returns the first bands of the square root of the matrix of prefix sums.

    Entry ``k`` of its first column is ``(-1)^k binom(-1/2, k)``.
    """
    column = [1.0]
    for place in range(1, bands):
        column.append(column[-1] * (2 * place - 1) / (2 * place))
    return Factor(tuple(column))


def participations_of(rounds: int, separation: int) -> int:
    """Returns how often a client can participate, at most once per ``separation`` rounds."""
    return -(-rounds // separation)


@lru_cache(maxsize=64)
def factor_for(rounds: int, separation: int) -> Factor:
    """Returns the factor with the least noise on the last prefix sum, at equal privacy.

    More bands cancel more noise but have a larger norm; there are at most ``separation`` bands.
    """
    most = min(separation, rounds, _MAX_BANDS)
    tried = sorted({most, *(2**power for power in range(most.bit_length()))} - {0})
    factors = [square_root(bands) for bands in tried if bands <= most]
    return min(factors, key=lambda factor: factor.norm * factor.error(rounds))
