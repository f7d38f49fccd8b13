"""A weighted sum that is the same bits in whatever order, and however split, it is added up."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from fedcore.errors import InvalidUpdate
from fedcore.updates.pack import Vector
from server.rounds.aggregation.limbs import MOST, UNIT, add_whole, carry, to_floats, whole_parts

STEP = 2.0**-36
"""One unit of fixed point: 1.5e-11, far below float32's step for weights of usual size."""
_SCALE = 1 / STEP
_EXACT = 2.0**53  # below it float64 holds every whole number
_EXACT_WEIGHT = 2**29  # times float32's 24 bits: up to here float64 holds every product
_ROUNDER = 1.5 * 2.0**52
"""Between it and twice 2**52 float64 holds whole numbers alone: what is added to it is rounded, as
`np.rint` rounds, and its bits then count up from those of this one. NumPy turns float64 into whole
numbers one at a time, and does this for eight at once."""
_ROUNDER_BITS = np.float64(_ROUNDER).view(np.int64)
_ROUNDS_BELOW = 2.0**51
_LOW_BITS = 20  # of a greater weight, which is added in two parts
_CHUNK = 1 << 16  # elements; temporaries stay in the cache and memory stays O(model)
Parts = Callable[[], Iterable[Vector]]
"""Gives a vector from its first element to its last, part by part, each time that it is called."""
AddScaled = Callable[[NDArray[np.float32], NDArray[np.float64], NDArray[np.int64]], None]
"""Takes rows ``(K, D)``, a factor for each, and a total ``(D,)``, to which it adds the products,
each rounded to a whole number first. Whoever calls it sees to it that no sum reaches 2**63."""


class ExactMean:
    """Accumulates ``sum(weight * vector)`` in fixed point, as a whole number of any size.

    Integer addition is associative, so the mean does not depend on the order of arrival. Ordinary
    sums stay below 2**26 and take 8 bytes an element, whatever the number of updates; what grows
    beyond is carried into further numbers of 8 bytes, which are there once they are needed.

    Guarantee:
        Each weighted element is rounded once, to a multiple of 2**-36 (twice where its weight
        passes 2**29); no sum is rounded, and none has a ceiling. The mean of vectors with weights
        ``w`` differs from the real one by at most ``2**-37 * n / sum(w)``, twice as much with such
        weights, and by rounding to float32.
    """

    def __init__(self, size: int) -> None:
        self._limbs: list[NDArray[np.int64]] = [np.zeros(size, np.int64)]
        """The sum is that of each times ``2**(32 * place)``, in units of `STEP`."""
        self._bounds = [0]
        """What the magnitudes of each stay within."""
        self.weight = 0
        """Sum of weights so far."""
        self.count = 0
        """Updates so far."""

    def touch(self) -> None:
        """Has the system give the sum its memory now; nothing may have been added yet.

        Else it does so page by page with the first update, while others wait for the processor.
        """
        assert not self.count
        self._limbs[0].fill(0)

    def add(self, vector: Vector, weight: int) -> None:
        """Folds in one update.

        Args:
            vector: Shape ``(D,)``, finite.
            weight: A positive whole number.

        Raises:
            InvalidUpdate: a value is not finite; the sum is unchanged then.
        """

        def parts() -> Iterable[Vector]:
            return (vector[start : start + _CHUNK] for start in range(0, len(vector), _CHUNK))

        self.add_parts(parts, weight)

    def add_parts(self, parts: Parts, weight: int, *, peaks: Sequence[float] | None = None) -> None:
        """As `add`, where the vector need not be in memory as a whole.

        Args:
            parts: The vector.
            weight: A positive whole number.
            peaks: The largest magnitude in each part, where that is known; looked for when None.

        Raises:
            InvalidUpdate: a value is not finite; the sum is unchanged then.
        """
        if peaks is None:
            peaks = [max(float(part.max()), -float(part.min())) for part in parts()]
        if not all(map(math.isfinite, peaks)):
            raise InvalidUpdate(
                "aggregation: an update holds values that are not finite. This client was not "
                "aggregated; lower client.learning_rate."
            )
        for factor in _factors(weight):
            self._add(parts, peaks, factor)
        self.weight, self.count = self.weight + weight, self.count + 1

    def has_room(self, peaks: Sequence[float], weight: int) -> bool:
        """Whether a vector with these peaks can be added without more memory than there is."""
        (factor, *more) = _factors(weight)
        bound = max(peaks, default=0.0) * factor
        return not more and bound < MOST // 4 and self._bounds[0] + int(bound) + 1 < MOST

    def take_back(self, parts: Parts, weight: int, *, peaks: Sequence[float]) -> None:
        """Takes back a vector that `add_parts` added when there was room for it.

        Guarantee:
            The sum is what it would be without. Nothing may have been added since for which there
            was no room.
        """
        (factor,) = _factors(weight)
        most = max(peaks, default=0.0) * factor
        self._add_ordinary(parts, -factor, most)
        self._bounds[0] -= int(most) + 1
        self.weight, self.count = self.weight - weight, self.count - 1

    def add_rows(
        self,
        rows: NDArray[np.float32],
        weights: Sequence[int],
        add_scaled: AddScaled | None = None,
    ) -> None:
        """Folds in many updates at once, with the bits that one after the other would give.

        Args:
            rows: Shape ``(K, D)``, finite.
            weights: A positive whole number for each row.
            add_scaled: What adds the rows up, where there is anything quicker than NumPy.

        Raises:
            InvalidUpdate: a value is not finite; the rows before its own may have been added.
        """
        peaks = np.maximum(rows.max(axis=1, initial=0.0), -rows.min(axis=1, initial=0.0))
        factors = np.array(weights, np.float64) * _SCALE
        products = peaks * factors
        ordinary = (products < MOST // 4) & (factors <= _EXACT_WEIGHT * _SCALE)
        for place in map(int, np.flatnonzero(~ordinary)):
            self.add(rows[place], weights[place])
        if not ordinary.all():
            rows, factors, products = rows[ordinary], factors[ordinary], products[ordinary]
        taken = [weight for weight, one in zip(weights, ordinary, strict=True) if one]
        for batch in _batches(products):
            self._make_room(0, sum(int(product) + 1 for product in products[batch]))
            if add_scaled is not None:
                add_scaled(rows[batch], factors[batch], self._limbs[0])
            else:
                self._add_scaled(rows[batch], factors[batch], float(products[batch].sum()))
        self.weight += sum(taken)
        self.count += len(taken)

    def _add(self, parts: Parts, peaks: Sequence[float], factor: float) -> None:
        ordinary = [peak * factor for peak in peaks if peak * factor < MOST // 4]
        wide = max(peaks, default=0.0) * factor if len(ordinary) < len(peaks) else 0.0
        for limb in range(whole_parts(wide) if wide else 0):
            self._make_room(limb, UNIT)
        most = max(ordinary, default=0.0)
        self._make_room(0, int(most) + 1)
        if not wide:
            self._add_ordinary(parts, factor, most)
            return
        start = 0
        for part, peak in zip(parts(), peaks, strict=True):
            place = slice(start, start + len(part))
            scaled = np.multiply(part, factor, dtype=np.float64)
            np.rint(scaled, out=scaled)
            if peak * factor < MOST // 4:
                self._limbs[0][place] += scaled.astype(np.int64)
            else:
                add_whole([limb[place] for limb in self._limbs], scaled)
            start += len(part)

    def _add_ordinary(self, parts: Parts, factor: float, most: float) -> None:
        """Adds a vector whose products, of magnitude ``most``, the first limb has room for."""
        start = 0
        # Were they allocated for each part, the kernel would map and zero them each time.
        products = np.empty(min(_CHUNK, len(self._limbs[0])), np.float64)
        whole = products.view(np.int64)
        for part in parts():
            for first in range(0, len(part), _CHUNK):
                piece = part[first : first + _CHUNK]
                scaled, added = products[: len(piece)], whole[: len(piece)]
                np.copyto(scaled, piece)
                np.multiply(scaled, factor, out=scaled)
                if most < _ROUNDS_BELOW:
                    np.add(scaled, _ROUNDER, out=scaled)
                    np.subtract(added, _ROUNDER_BITS, out=added)
                else:
                    np.rint(scaled, out=scaled)
                    np.copyto(added, scaled, casting="unsafe")
                self._limbs[0][start : start + len(piece)] += added
                start += len(piece)
        assert start == len(self._limbs[0]), "parts of another vector"

    def _add_scaled(
        self, rows: NDArray[np.float32], factors: NDArray[np.float64], bound: float
    ) -> None:
        small = bound + len(rows) < _EXACT  # then sums of whole numbers are exact in float64, too
        step = max(1, _CHUNK // max(1, len(rows)))
        for start in range(0, rows.shape[1], step):
            part = slice(start, start + step)
            scaled = np.multiply(rows[:, part], factors[:, None], dtype=np.float64)
            np.rint(scaled, out=scaled)
            total = scaled.sum(axis=0) if small else scaled.astype(np.int64).sum(axis=0)
            self._limbs[0][part] += total.astype(np.int64, copy=False)

    def merge(self, other: ExactMean) -> None:
        """Folds in everything that another sum holds."""
        for place, (limb, bound) in enumerate(zip(other._limbs, other._bounds, strict=True)):
            self._make_room(place, bound)
            # What came from another process may be read-only.
            self._limbs[place] = self._limbs[place] + limb
        self.weight, self.count = self.weight + other.weight, self.count + other.count

    def mean(self) -> Vector:
        """The weighted mean, shape ``(D,)``, float32; at least one update must have come in.

        What float32 cannot express comes out as an infinity.
        """
        mean = np.empty(len(self._limbs[0]), np.float32)
        for part, values in zip(self._chunks(), self.mean_parts(), strict=True):
            mean[part] = values
        return mean

    def mean_parts(self) -> Iterator[Vector]:
        """As `mean`, part by part; each lies in the memory of the one before."""
        assert self.weight > 0
        size = min(_CHUNK, len(self._limbs[0]))
        # Were they allocated for each part, the kernel would map and zero them each time.
        wide, values = np.empty(size, np.float64), np.empty(size, np.float32)
        for part in self._chunks():
            count = part.stop - part.start
            found = to_floats(self._parts(part), wide[:count])
            with np.errstate(over="ignore"):
                np.divide(found, self.weight * _SCALE, out=found)
                np.copyto(values[:count], found, casting="same_kind")
            yield values[:count]

    def differences(self, base: Vector) -> NDArray[np.float64]:
        """The sum of ``vector - base`` over all updates, shape ``(D,)``; each must weigh 1.

        Guarantee:
            It is the sum of one term an update, ``vector`` and ``base`` each rounded to a multiple
            of 2**-36 before, without any rounding of sums: leaving one update out changes it by
            that update's own term, and by nothing else. (Where a sum passes 2**17, float64 cannot
            express it, and rounds it.)
        """
        assert self.weight == self.count
        found = np.empty(len(self._limbs[0]))
        for part in self._chunks():
            own = base[part]
            peak = max(float(own.max()), -float(own.min())) * _SCALE + 1
            scaled = np.rint(np.multiply(own, _SCALE, dtype=np.float64))
            if len(self._limbs) == 1 and self._bounds[0] + peak * self.count < MOST:
                whole = self._limbs[0][part] - self.count * scaled.astype(np.int64)
                np.multiply(whole, STEP, out=found[part])
                continue
            taken = [np.zeros(len(scaled), np.int64) for _ in range(whole_parts(peak))]
            add_whole(taken, scaled)
            limbs = [limb.copy() for limb in self._parts(part)]
            limbs += [np.zeros(len(scaled), np.int64) for _ in range(len(taken) - len(limbs) + 1)]
            for place in range(len(limbs) - 1):
                carry(limbs, place)  # so that there is room for any count below 2**30
            for limb, each in zip(limbs, taken, strict=False):
                limb -= self.count * each
            np.multiply(to_floats(limbs), STEP, out=found[part])
        return found

    def _make_room(self, place: int, bound: int) -> None:
        """Sees to it that numbers within ``bound`` can be added to the limb at ``place``."""
        if place == len(self._limbs):
            self._limbs.append(np.zeros(len(self._limbs[0]), np.int64))  # no memory until written
            self._bounds.append(0)
        if self._bounds[place] + bound >= MOST:
            carried = (self._bounds[place] >> 32) + 1
            self._make_room(place + 1, carried)
            if not self._limbs[place].flags.writeable:
                self._limbs[place] = self._limbs[place].copy()
            for part in self._chunks():
                carry([self._limbs[place][part], self._limbs[place + 1][part]], 0)
            self._bounds[place] = UNIT
        self._bounds[place] += bound

    def _chunks(self) -> Iterator[slice]:
        size = len(self._limbs[0])
        return (slice(start, min(size, start + _CHUNK)) for start in range(0, size, _CHUNK))

    def _parts(self, part: slice) -> list[NDArray[np.int64]]:
        return [limb[part] for limb in self._limbs]


def _factors(weight: int) -> list[float]:
    """Factors that a vector is multiplied by, one after the other, each product being exact."""
    if weight <= _EXACT_WEIGHT:
        return [weight * _SCALE]
    low = weight & (1 << _LOW_BITS) - 1
    return [(weight - low) * _SCALE, low * _SCALE]


def _batches(products: NDArray[np.float64]) -> Iterator[slice]:
    """Rows that are added up together: their sum has room."""
    if float(products.sum()) + len(products) < MOST // 2:
        yield slice(0, len(products))
        return
    yield from (slice(place, place + 1) for place in range(len(products)))
