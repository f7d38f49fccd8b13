"""Noise that is correlated over rounds, so that much of it cancels in a running sum.

Of a sum that grows by one vector a round, each prefix is released. Independent noise on every
vector adds up; the matrix mechanism adds ``C^-1 z`` instead, where ``z`` is independent noise and
``C`` a lower triangular matrix, and is as private as releasing ``C g + z``. ``C`` here is a banded
Toeplitz matrix: its first column says all of it, and the noise of a round takes back some of what
was added in as many rounds before as there are bands.

Source:
    Choquette-Choo et al. 2023, arXiv:2306.08153 (banded factors, sensitivity under participation
    that is so many rounds apart); Fichtenberger, Henzinger, Upadhyay 2023, arXiv:2202.11205 (the
    square root of the matrix of prefix sums); Kalinin, Lampert 2024, arXiv:2405.13763 (its bands).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
_MOST_BANDS = 64  # each keeps one vector of noise as long as the model


@dataclass(frozen=True)
class Factor:
    """A banded Toeplitz matrix ``C``, by the entries of its first column that are not zero."""

    column: tuple[float, ...]
    """The first is 1."""

    @property
    def norm(self) -> float:
        """The L2 norm of a column; of the last ones, which are cut off, an upper bound."""
        return math.sqrt(math.fsum(entry * entry for entry in self.column))

    def sensitivity(self, participations: int) -> float:
        """How far ``C g`` moves when one client, whose vectors have norm 1 at most, is left out.

        Guarantee:
            Holds where two rounds of one client are at least as many apart as there are bands:
            then its columns have no row in common, and their norms add up squared.
        """
        return math.sqrt(participations) * self.norm

    def error(self, rounds: int) -> float:
        """The standard deviation of the last prefix sum's noise, with ``z`` of deviation 1."""
        return float(np.linalg.norm(self._inverse_sums(rounds)))

    def correlated(self, fresh: Floats, before: Sequence[Floats]) -> Floats:
        """``C^-1 z`` in one round.

        Args:
            fresh: ``z`` of this round.
            before: What this gave in the rounds before, the latest last; ``len(column) - 1`` of
                them are looked at.
        """
        return fresh - self.carried(len(fresh), before)

    def carried(self, size: int, before: Sequence[Floats]) -> Floats:
        """What noise of the rounds before is taken back in this one."""
        total = np.zeros(size)
        for entry, noise in zip(self.column[1:], reversed(before), strict=False):
            total += entry * noise
        return total

    def _inverse_sums(self, rounds: int) -> Floats:
        """The first column of ``A C^-1``, where ``A`` is the matrix of prefix sums."""
        column = np.array(self.column)
        inverse = np.zeros(rounds)
        for row in range(rounds):
            seen = inverse[max(0, row - len(column) + 1) : row][::-1]
            inverse[row] = (row == 0) - float(column[1 : 1 + len(seen)] @ seen)
        return np.cumsum(inverse)


def square_root(bands: int) -> Factor:
    """The first bands of the square root of the matrix of prefix sums.

    Its first column is ``(-1)^k binom(-1/2, k)``.
    """
    column = [1.0]
    for place in range(1, bands):
        column.append(column[-1] * (2 * place - 1) / (2 * place))
    return Factor(tuple(column))


def participations_of(rounds: int, separation: int) -> int:
    """How often one client can take part in ``rounds``, once in ``separation`` of them."""
    return -(-rounds // separation)


@lru_cache(maxsize=64)
def factor_for(rounds: int, separation: int) -> Factor:
    """The factor whose last prefix sum has the least noise, at the same privacy.

    More bands cancel more noise and have a greater norm; there are never more than ``separation``.
    """
    most = min(separation, rounds, _MOST_BANDS)
    tried = sorted({most, *(2**power for power in range(most.bit_length()))} - {0})
    factors = [square_root(bands) for bands in tried if bands <= most]
    return min(factors, key=lambda factor: factor.norm * factor.error(rounds))
