"""A weighted sum that is the same bits in whatever order, and however split, it is added up."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from fedcore.errors import InvalidUpdate
from fedcore.updates.pack import Vector

STEP = 2.0**-36
"""One unit of fixed point: 1.5e-11, far below float32's step for weights of usual size."""
_SCALE = 1 / STEP
_LIMIT = 2.0**62  # of 2**63: what is added is rounded, and rounding must not overflow
_EXACT = 2.0**53  # below it float64 holds every whole number
_CHUNK = 1 << 16  # elements; temporaries stay in the cache and memory stays O(model)
Parts = Callable[[], Iterable[Vector]]
"""Gives a vector from its first element to its last, part by part, each time that it is called."""
AddScaled = Callable[[NDArray[np.float32], NDArray[np.float64], NDArray[np.int64]], None]
"""Takes rows ``(K, D)``, a factor for each, and a total ``(D,)``, to which it adds the products,
each rounded to a whole number first. Whoever calls it sees to it that no sum reaches 2**62."""


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

        def parts() -> Iterable[Vector]:
            return (vector[start : start + _CHUNK] for start in range(0, len(vector), _CHUNK))

        self.add_parts(parts, weight)

    def add_parts(self, parts: Parts, weight: int) -> None:
        """As `add`, where the vector need not be in memory as a whole.

        Raises:
            InvalidUpdate: the sum could leave its range; it is unchanged then.
        """
        peaks = [max(float(part.max()), -float(part.min())) for part in parts()]
        peak = float(np.max(peaks, initial=0.0))
        bound = self._bound + peak * weight * _SCALE + 1
        if not bound < _LIMIT:
            raise InvalidUpdate(out_of_range(peak, weight))
        start = 0
        for part in parts():
            end = start + len(part)
            scaled = np.multiply(part, weight * _SCALE, dtype=np.float64)
            self._sum[start:end] += np.rint(scaled, out=scaled).astype(np.int64)
            start = end
        self._bound, self.weight, self.count = bound, self.weight + weight, self.count + 1

    def add_rows(
        self,
        rows: NDArray[np.float32],
        weights: Sequence[int],
        add_scaled: AddScaled | None = None,
    ) -> list[int]:
        """Folds in many updates at once, with the bits that one after the other would give.

        Args:
            rows: Shape ``(K, D)``, finite.
            weights: A positive whole number for each row.
            add_scaled: What adds the rows up, where there is anything quicker than NumPy.

        Returns:
            The places of rows that were refused, because the sum could leave its range.
        """
        peaks = np.maximum(rows.max(axis=1, initial=0.0), -rows.min(axis=1, initial=0.0))
        taken: list[int] = []
        for place, (peak, weight) in enumerate(zip(peaks, weights, strict=True)):
            bound = self._bound + float(peak) * weight * _SCALE + 1
            if bound < _LIMIT:
                taken.append(place)
                self._bound = bound
        refused = sorted(set(range(len(rows))) - set(taken))
        rows = rows[taken] if refused else rows
        factors = np.array([weights[place] for place in taken], np.float64) * _SCALE
        if add_scaled is not None:
            add_scaled(rows, factors, self._sum)
        else:
            self._add_scaled(rows, factors)
        self.weight += sum(weights[place] for place in taken)
        self.count += len(taken)
        return refused

    def _add_scaled(self, rows: NDArray[np.float32], factors: NDArray[np.float64]) -> None:
        small = self._bound < _EXACT  # then sums of whole numbers are exact in float64, too
        step = max(1, _CHUNK // max(1, len(rows)))
        for start in range(0, rows.shape[1], step):
            part = slice(start, start + step)
            scaled = np.multiply(rows[:, part], factors[:, None], dtype=np.float64)
            np.rint(scaled, out=scaled)
            total = scaled.sum(axis=0) if small else scaled.astype(np.int64).sum(axis=0)
            self._sum[part] += total.astype(np.int64, copy=False)

    def merge(self, other: ExactMean) -> None:
        """Folds in everything that another sum holds.

        Raises:
            InvalidUpdate: the sum could leave its range; it is unchanged then.
        """
        bound = self._bound + other._bound
        if not bound < _LIMIT:
            raise InvalidUpdate(
                f"aggregation: the sums of {self.count} and of {other.count} updates together "
                "leave the range of exact sums (2**26 in all). They were not aggregated; lower "
                "client.learning_rate, or use uniform weighting."
            )
        self._sum = self._sum + other._sum  # what came from another process may be read-only
        self._bound = bound
        self.weight, self.count = self.weight + other.weight, self.count + other.count

    def mean(self) -> Vector:
        """The weighted mean, shape ``(D,)``, float32; at least one update must have come in."""
        assert self.weight > 0
        mean = np.empty(len(self._sum), np.float32)
        for start in range(0, len(mean), _CHUNK):
            part = slice(start, start + _CHUNK)
            mean[part] = self._sum[part] / (self.weight * _SCALE)
        return mean

    def differences(self, base: Vector) -> NDArray[np.float64]:
        """The sum of ``vector - base`` over all updates, shape ``(D,)``; each must weigh 1.

        Guarantee:
            It is the sum of one term an update, ``vector`` and ``base`` each rounded to a multiple
            of 2**-36 before, without any rounding of sums: leaving one update out changes it by
            that update's own term, and by nothing else.
        """
        assert self.weight == self.count
        found = np.empty(len(self._sum))
        for start in range(0, len(found), _CHUNK):
            part = slice(start, start + _CHUNK)
            scaled = np.rint(np.multiply(base[part], _SCALE, dtype=np.float64)).astype(np.int64)
            np.multiply(self._sum[part] - self.count * scaled, STEP, out=found[part])
        return found


def out_of_range(peak: float, weight: int) -> str:
    """Why an update was refused whose largest magnitude is ``peak``."""
    return (
        f"aggregation: values of magnitude {peak:.3g} at weight {weight} leave "
        "the range of exact sums (2**26 in all). This client was not aggregated; lower "
        "client.learning_rate, or use uniform weighting."
    )
