"""Exact weighted sum: the same bits in any order, and however the updates are split into sums."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from fedcore.errors import InvalidUpdate
from fedcore.finite import all_finite, largest_magnitude
from fedcore.updates.pack import Vector
from server.rounds.aggregation.limbs import MAX_LIMB, UNIT, add_whole, carry, to_floats, whole_parts

STEP = 2.0**-36
"""Unit of the fixed-point format: 1.5e-11, far below float32's spacing at usual weights."""
_SCALE = 1 / STEP
_EXACT = 2.0**53  # float64 represents every integer below this
_EXACT_WEIGHT = 2**29  # up to this, products with float32 (24 bits) are exact in float64
_ROUNDER = 1.5 * 2.0**52
"""Between this and twice 2**52, float64 represents only integers. So adding it to a value rounds
the value like `np.rint`, and the bits of the sum count up from those of this constant. NumPy
converts float64 to integers one at a time, but does this for eight at once."""
_ROUNDER_BITS = np.float64(_ROUNDER).view(np.int64)
_ROUNDS_BELOW = 2.0**51
_LOW_BITS = 20  # a larger weight is split after these and added in two steps
_CHUNK = 1 << 16  # elements; temporaries stay in the cache and memory stays O(model)
Parts = Callable[[], Iterable[Vector]]
"""Returns a vector part by part, from first element to last; can be called repeatedly."""
AddScaled = Callable[[NDArray[np.float32], NDArray[np.float64], NDArray[np.int64]], None]
"""Adds rows ``(K, D)``, each multiplied by its factor and rounded to integers, to a total
``(D,)``. The caller ensures that no sum reaches 2**63."""


class ExactMean:
    """Accumulates ``sum(weight * vector)`` in fixed point, as integers of any size.

    Integer addition is associative, so the mean does not depend on the order of arrival. Usual sums
    stay below 2**26 and take 8 bytes per element for any number of updates. Larger ones carry into
    further 8-byte limbs, allocated only when needed.

    Guarantee:
        Each weighted element is rounded once, to a multiple of 2**-36 (twice if its weight exceeds
        2**29). No sum is rounded or limited in size. The mean of vectors with weights ``w`` differs
        from the real one by at most ``2**-37 * n / sum(w)``, twice that with such weights, plus
        rounding to float32.
    """

    def __init__(self, size: int, add_scaled: AddScaled | None = None) -> None:
        """Starts an empty sum of vectors of ``size`` elements.

        ``add_scaled`` is a faster implementation for vectors in contiguous parts; NumPy when None.
        """
        self._compiled = add_scaled
        self._limbs: list[NDArray[np.int64]] = [np.zeros(size, np.int64)]
        """Limbs of the sum: each counts ``2**(32 * index)``, in units of `STEP`."""
        self._bounds = [0]
        """Upper bounds on the magnitudes in each limb."""
        self.weight = 0
        """Sum of the weights added so far."""
        self.count = 0
        """Number of updates added so far."""

    def touch(self) -> None:
        """Allocates the sum's memory pages in advance; call it before the first update.

        Otherwise the system allocates page by page during the first update, which delays it.
        """
        assert not self.count
        self._limbs[0].fill(0)

    def add(self, vector: Vector, weight: int) -> None:
        """Adds one update.

        Args:
            vector: Shape ``(D,)``, finite.
            weight: A positive integer.

        Raises:
            InvalidUpdate: a value is not finite; the sum is unchanged.
        """

        def parts() -> Iterable[Vector]:
            return (vector[start : start + _CHUNK] for start in range(0, len(vector), _CHUNK))

        self.add_parts(parts, weight)

    def add_parts(self, parts: Parts, weight: int, *, peaks: Sequence[float] | None = None) -> None:
        """Adds one update that comes in parts, so that it need not be in memory at once.

        Args:
            parts: Returns the vector's parts.
            weight: A positive integer.
            peaks: Largest magnitude in each part, where known; computed when None.

        Raises:
            InvalidUpdate: a value is not finite; the sum is unchanged.
        """
        if peaks is None:
            peaks = [largest_magnitude(part) for part in parts()]
        if not all_finite(peaks):
            raise InvalidUpdate(
                "aggregation: an update contains values that are not finite. This client was not "
                "aggregated; lower client.learning_rate."
            )
        for factor in _factors(weight):
            self._add(parts, peaks, factor)
        self.weight, self.count = self.weight + weight, self.count + 1

    def has_room(self, peaks: Sequence[float], weight: int) -> bool:
        """Whether a vector with these peaks can be added without allocating a further limb."""
        (factor, *more) = _factors(weight)
        bound = max(peaks, default=0.0) * factor
        return not more and bound < MAX_LIMB // 4 and self._bounds[0] + int(bound) + 1 < MAX_LIMB

    def subtract(self, parts: Parts, weight: int, *, peaks: Sequence[float]) -> None:
        """Subtracts a vector that `add_parts` added while `has_room` was true.

        Guarantee:
            The sum is the one without the vector. No vector without room may have been added since.
        """
        (factor,) = _factors(weight)
        peak = max(peaks, default=0.0) * factor
        self._add_ordinary(parts, -factor, peak)
        self._bounds[0] -= int(peak) + 1
        self.weight, self.count = self.weight - weight, self.count - 1

    def add_rows(
        self,
        rows: NDArray[np.float32],
        weights: Sequence[int],
        add_scaled: AddScaled | None = None,
    ) -> None:
        """Adds many updates at once, with the same bits as one after the other.

        Args:
            rows: Shape ``(K, D)``, finite.
            weights: A positive integer for each row.
            add_scaled: Faster implementation of the sum; NumPy is used when None.

        Raises:
            InvalidUpdate: a value is not finite; rows before it may have been added.
        """
        peaks = np.maximum(rows.max(axis=1, initial=0.0), -rows.min(axis=1, initial=0.0))
        factors = np.array(weights, np.float64) * _SCALE
        products = peaks * factors
        ordinary = (products < MAX_LIMB // 4) & (factors <= _EXACT_WEIGHT * _SCALE)
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
        ordinary = [peak * factor for peak in peaks if peak * factor < MAX_LIMB // 4]
        wide = max(peaks, default=0.0) * factor if len(ordinary) < len(peaks) else 0.0
        for limb in range(whole_parts(wide) if wide else 0):
            self._make_room(limb, UNIT)
        peak = max(ordinary, default=0.0)
        self._make_room(0, int(peak) + 1)
        if not wide:
            self._add_ordinary(parts, factor, peak)
            return
        start = 0
        for part, peak in zip(parts(), peaks, strict=True):
            place = slice(start, start + len(part))
            scaled = np.multiply(part, factor, dtype=np.float64)
            np.rint(scaled, out=scaled)
            if peak * factor < MAX_LIMB // 4:
                self._limbs[0][place] += scaled.astype(np.int64)
            else:
                add_whole([limb[place] for limb in self._limbs], scaled)
            start += len(part)

    def _add_ordinary(self, parts: Parts, factor: float, peak: float) -> None:
        """Adds a vector to the first limb, which has room for products of magnitude ``peak``."""
        if self._compiled is not None:
            self._add_compiled(self._compiled, parts, factor)
            return
        start = 0
        # Allocated once: otherwise the kernel maps and zeroes new pages for each part.
        products = np.empty(min(_CHUNK, len(self._limbs[0])), np.float64)
        whole = products.view(np.int64)
        for part in parts():
            for first in range(0, len(part), _CHUNK):
                piece = part[first : first + _CHUNK]
                scaled, added = products[: len(piece)], whole[: len(piece)]
                np.copyto(scaled, piece)
                np.multiply(scaled, factor, out=scaled)
                if peak < _ROUNDS_BELOW:
                    np.add(scaled, _ROUNDER, out=scaled)
                    np.subtract(added, _ROUNDER_BITS, out=added)
                else:
                    np.rint(scaled, out=scaled)
                    np.copyto(added, scaled, casting="unsafe")
                self._limbs[0][start : start + len(piece)] += added
                start += len(piece)
        assert start == len(self._limbs[0]), "parts of a vector of another length"

    def _add_compiled(self, add_scaled: AddScaled, parts: Parts, factor: float) -> None:
        start, factors, total = 0, np.array([factor]), self._limbs[0]
        for part in parts():
            add_scaled(part[None], factors, total[start : start + len(part)])
            start += len(part)
        assert start == len(total), "parts of a vector of another length"

    def _add_scaled(
        self, rows: NDArray[np.float32], factors: NDArray[np.float64], bound: float
    ) -> None:
        small = bound + len(rows) < _EXACT  # then float64 sums of integers are exact
        step = max(1, _CHUNK // max(1, len(rows)))
        for start in range(0, rows.shape[1], step):
            part = slice(start, start + step)
            scaled = np.multiply(rows[:, part], factors[:, None], dtype=np.float64)
            np.rint(scaled, out=scaled)
            total = scaled.sum(axis=0) if small else scaled.astype(np.int64).sum(axis=0)
            self._limbs[0][part] += total.astype(np.int64, copy=False)

    def merge(self, other: ExactMean) -> None:
        """Adds everything that another sum contains."""
        for place, (limb, bound) in enumerate(zip(other._limbs, other._bounds, strict=True)):
            self._make_room(place, bound)
            # Limbs from another process may be read-only.
            self._limbs[place] = self._limbs[place] + limb
        self.weight, self.count = self.weight + other.weight, self.count + other.count

    def mean(self) -> Vector:
        """Returns the weighted mean, shape ``(D,)``, float32; requires at least one update.

        Values beyond the range of float32 become infinities.
        """
        mean = np.empty(len(self._limbs[0]), np.float32)
        for part, values in zip(self._chunks(), self.mean_parts(), strict=True):
            mean[part] = values
        return mean

    def mean_parts(self) -> Iterator[Vector]:
        """Yields the weighted mean in parts; each overwrites the memory of the one before.

        Requires at least one update.
        """
        assert self.weight > 0
        size = min(_CHUNK, len(self._limbs[0]))
        # Allocated once: otherwise the kernel maps and zeroes new pages for each part.
        wide, values = np.empty(size, np.float64), np.empty(size, np.float32)
        for part in self._chunks():
            count = part.stop - part.start
            found = to_floats(self._parts(part), wide[:count])
            with np.errstate(over="ignore"):
                np.divide(found, self.weight * _SCALE, out=found)
                np.copyto(values[:count], found, casting="same_kind")
            yield values[:count]

    def differences(self, base: Vector) -> NDArray[np.float64]:
        """Returns the sum of ``vector - base`` over all updates, shape ``(D,)``; each has weight 1.

        Guarantee:
            The result is the exact sum of one term per update: ``vector`` and ``base``, each first
            rounded to a multiple of 2**-36, and subtracted. So leaving an update out changes it by
            exactly that update's term. (Where a sum exceeds 2**17, float64 cannot represent it and
            rounds it.)
        """
        assert self.weight == self.count
        found = np.empty(len(self._limbs[0]))
        for part in self._chunks():
            own = base[part]
            peak = largest_magnitude(own) * _SCALE + 1
            scaled = np.rint(np.multiply(own, _SCALE, dtype=np.float64))
            if len(self._limbs) == 1 and self._bounds[0] + peak * self.count < MAX_LIMB:
                whole = self._limbs[0][part] - self.count * scaled.astype(np.int64)
                np.multiply(whole, STEP, out=found[part])
                continue
            taken = [np.zeros(len(scaled), np.int64) for _ in range(whole_parts(peak))]
            add_whole(taken, scaled)
            limbs = [limb.copy() for limb in self._parts(part)]
            limbs += [np.zeros(len(scaled), np.int64) for _ in range(len(taken) - len(limbs) + 1)]
            for place in range(len(limbs) - 1):
                carry(limbs, place)  # makes room for any count below 2**30
            for limb, each in zip(limbs, taken, strict=False):
                limb -= self.count * each
            np.multiply(to_floats(limbs), STEP, out=found[part])
        return found

    def _make_room(self, place: int, bound: int) -> None:
        """Ensures that integers up to ``bound`` can be added to the limb at ``place``."""
        if place == len(self._limbs):
            self._limbs.append(np.zeros(len(self._limbs[0]), np.int64))  # no memory until written
            self._bounds.append(0)
        if self._bounds[place] + bound >= MAX_LIMB:
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
    """Returns the factors to multiply a vector by and add in turn; each product is exact."""
    if weight <= _EXACT_WEIGHT:
        return [weight * _SCALE]
    low = weight & (1 << _LOW_BITS) - 1
    return [(weight - low) * _SCALE, low * _SCALE]


def _batches(products: NDArray[np.float64]) -> Iterator[slice]:
    """Yields slices of rows whose sum stays within a limb."""
    if float(products.sum()) + len(products) < MAX_LIMB // 2:
        yield slice(0, len(products))
        return
    yield from (slice(place, place + 1) for place in range(len(products)))
