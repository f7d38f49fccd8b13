"""A weighted sum that is the same bits in whatever order, and however split, it is added up."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedcore.errors import InvalidUpdate
from fedcore.updates.pack import Vector

_SCALE = 2.0**36  # one unit is 1.5e-11, far below float32's step for weights of usual size
_LIMIT = 2.0**62  # of 2**63: what is added is rounded, and rounding must not overflow
_CHUNK = 1 << 16  # elements; temporaries stay in the cache and memory stays O(model)


class ExactMean:
    """Accumulates ``sum(weight * vector)`` in 64-bit fixed point.

    Integer addition is associative, so the mean does not depend on the order of arrival. Memory is
    8 bytes an element, whatever the number of updates.

    Guarantee:
        Each weighted element is rounded once, to a multiple of 2**-36; the mean of vectors with
        weights ``w`` differs from the real one by at most ``2**-37 * n / sum(w)`` before the
        final rounding to float32. The sum of magnitudes stays below 2**26, or the update that
        would pass it is refused.
    """

    def __init__(self, size: int) -> None:
        self._sum: NDArray[np.int64] = np.zeros(size, np.int64)
        self._bound = 0.0
        self.weight = 0
        """Sum of weights so far."""
        self.count = 0
        """Updates so far."""

    def add(self, vector: Vector, weight: int) -> None:
        """Folds in one update.

        Args:
            vector: Shape ``(D,)``, finite.
            weight: A positive whole number.

        Raises:
            InvalidUpdate: the sum could leave its range; it is unchanged then.
        """
        bound = self._bound + float(np.max(np.abs(vector), initial=0.0)) * weight * _SCALE + 1
        if not bound < _LIMIT:
            raise InvalidUpdate(
                f"aggregation: values of magnitude {np.max(np.abs(vector)):.3g} at weight {weight} "
                "leave the range of exact sums (2**26 in all). This client was not aggregated; "
                "lower client.learning_rate, or use uniform weighting."
            )
        for start in range(0, len(vector), _CHUNK):
            part = slice(start, start + _CHUNK)
            scaled = vector[part].astype(np.float64) * (weight * _SCALE)
            self._sum[part] += np.rint(scaled, out=scaled).astype(np.int64)
        self._bound, self.weight, self.count = bound, self.weight + weight, self.count + 1

    def mean(self) -> Vector:
        """The weighted mean, shape ``(D,)``, float32; at least one update must have come in."""
        assert self.weight > 0
        mean = np.empty(len(self._sum), np.float32)
        for start in range(0, len(mean), _CHUNK):
            part = slice(start, start + _CHUNK)
            mean[part] = self._sum[part] / (self.weight * _SCALE)
        return mean
