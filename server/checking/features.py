"""Ranges of input features over all clients: values far from the others, clients of other units.

In: blocks of inputs, by client. Out: values and clients that differ, by `FeatureRanges.extremes`
and `FeatureRanges.scales`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

MOST_FEATURES = 65_536
"""Inputs with more numbers are not compared."""
_SAMPLE_NUMBERS = 4_000_000  # 32 MB: rows that show what is usual
_ROWS_A_CLIENT = 64  # of which
_KEPT = 8  # clients named for one feature, on either side
_MEANS_NUMBERS = 16_000_000  # 64 MB: a mean for each client and feature
_FAR = 1000.0  # spreads from the median
_FAR_FROM_CONSTANT = 1e6
_STANDS_OUT = 10.0  # spreads, for numbers that often stand for a missing value
_STAND_INS = frozenset(
    [float(sign * int("9" * digits)) for sign in (1, -1) for digits in range(3, 11)]
    + [float(2**31 - 1), float(-(2**31)), float(2**63), float(-(2**63))]
)
_LEAST_ROWS = 8  # whose mean is compared
_LEAST_CLIENTS = 3
_OTHER_SCALE, _OTHER_UNIT = 30.0, 100.0
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class ExtremeValue:
    """A value far from nearly all others of its feature."""

    client: str
    row: int
    feature: int
    value: float
    low: float
    high: float
    """Between these are 90 % of the feature's values."""
    stand_in: bool
    """Whether it is a number that data sets use for a missing value, such as -999."""


@dataclass(frozen=True)
class OtherScale:
    """A client whose numbers are many times as large or small as those of the other clients."""

    client: str
    feature: int | None
    """The one feature that differs; None if most of them do."""
    typical: float
    others: float


class FeatureRanges:
    """Running summary of the inputs of all clients; memory does not grow with rows or clients."""

    def __init__(self, features: int) -> None:
        """Creates an empty summary of inputs with ``features`` numbers."""
        self._size = features
        self._sample: list[Floats] = []
        self._left = max(_SAMPLE_NUMBERS // max(features, 1), 256)
        shape = (_KEPT, features)
        self._values = {-1: np.full(shape, np.inf), 1: np.full(shape, -np.inf)}
        self._where = {side: np.zeros((2, *shape), np.int64) for side in (-1, 1)}
        self._names: list[str] = []
        self._means: list[tuple[str, NDArray[np.float32]]] = []

    def client(self, name: str) -> ClientRanges:
        """Returns the collector for one client's blocks; `ClientRanges.close` adds them."""
        return ClientRanges(self, name, self._size)

    def add(self, name: str, found: ClientRanges) -> None:
        """Adds what was collected of one client."""
        if not found.rows:
            return
        self._names.append(name)
        for side, (values, rows) in found.ends.items():
            self._keep(side, values, rows)
        for sample in found.sample:
            part = sample[: self._left]
            self._left -= len(part)
            if len(part):
                self._sample.append(part)
        if found.rows >= _LEAST_ROWS and len(self._means) * self._size < _MEANS_NUMBERS:
            with np.errstate(invalid="ignore", divide="ignore"):
                means = found.total / found.nonzero
            self._means.append((name, means.astype(np.float32)))

    def _keep(self, side: int, values: Floats, rows: NDArray[np.int64]) -> None:
        kept, where = self._values[side], self._where[side]
        if not (side * values > side * kept[-1]).any():
            return
        joined = np.concatenate([kept, values[None]])
        client = np.full(self._size, len(self._names) - 1)
        places = np.concatenate([where, np.stack([client, rows])[:, None]], axis=1)
        order = np.argsort(-side * joined, axis=0, kind="stable")[:_KEPT]
        self._values[side] = np.take_along_axis(joined, order, axis=0)
        self._where[side] = np.take_along_axis(places, order[None], axis=1)

    def extremes(self) -> Iterator[ExtremeValue]:
        """Yields values far from the others: of a client the farthest of each feature and side.

        A value is far if its distance from the feature's median is over 1000 times the range
        between the 5th and 95th percentile, or over 10 times for numbers such as -999; for a
        feature that is nearly constant, over a million times its size.
        """
        if not self._sample:
            return
        sample = np.concatenate(self._sample)
        low, middle, high = _quantiles(sample)
        with np.errstate(invalid="ignore"):
            spread = high - low
            constant = _FAR_FROM_CONSTANT * np.maximum(np.abs(middle), 1.0)
            far = np.where(spread > 0, _FAR * spread, constant)
            for side in (-1, 1):
                values = self._values[side]
                away = np.abs(values - middle)
                odd = np.isin(values, list(_STAND_INS)) & (away > _STANDS_OUT * spread)
                odd &= spread > 0
                for kept, feature in np.argwhere(np.isfinite(values) & ((away > far) | odd)):
                    client, row = self._where[side][:, kept, feature]
                    yield ExtremeValue(
                        self._names[client],
                        int(row),
                        int(feature),
                        float(values[kept, feature]),
                        float(low[feature]),
                        float(high[feature]),
                        bool(odd[kept, feature]),
                    )

    def scales(self) -> Iterator[OtherScale]:
        """Yields clients whose numbers have another scale: all features, or one in another unit.

        Compares mean magnitudes of what is not zero, so features that are rarely set compare well.
        """
        if len(self._means) < _LEAST_CLIENTS:
            return
        names, rows = zip(*self._means, strict=True)
        means: Floats = np.stack(rows).astype(np.float64)
        means[~np.isfinite(means) | (means <= 0)] = np.nan
        with np.errstate(invalid="ignore", divide="ignore"):
            usual = _quiet_median(means, axis=0)
            ratios = np.log(means / usual)
            whole = _quiet_median(ratios, axis=1)
        for place, name in enumerate(names):
            if abs(whole[place]) > math.log(_OTHER_SCALE):
                typical = float(_quiet_median(means[place], axis=0))
                yield OtherScale(name, None, typical, float(_quiet_median(usual, axis=0)))
                continue
            if self._size > 1:
                for feature in np.flatnonzero(np.abs(ratios[place]) > math.log(_OTHER_UNIT)):
                    yield OtherScale(
                        name,
                        int(feature),
                        float(means[place, feature]),
                        float(usual[feature]),
                    )


class ClientRanges:
    """Collector of one client's inputs."""

    def __init__(self, ranges: FeatureRanges, name: str, features: int) -> None:
        """Creates an empty collector; see `FeatureRanges.client`."""
        self._ranges, self._name = ranges, name
        self.rows = 0
        self.sample: list[Floats] = []
        self.ends = {
            side: (np.full(features, -side * np.inf), np.zeros(features, np.int64))
            for side in (-1, 1)
        }
        self.total, self.nonzero = np.zeros(features), np.zeros(features)

    def add(self, rows: Sequence[int], inputs: Tensor) -> None:
        """Adds a block of inputs of the expected shape; values that are not finite are left out."""
        values = inputs.detach().double().reshape(len(rows), -1).numpy()
        finite = np.isfinite(values)
        if len(self.sample) == 0:
            picked = np.linspace(0, len(rows) - 1, min(_ROWS_A_CLIENT, len(rows))).astype(int)
            self.sample.append(np.where(finite, values, np.nan)[picked])
        for side, (best, where) in self.ends.items():
            held = np.where(finite, values, -side * np.inf)
            places = (side * held).argmax(axis=0)
            ends = held[places, np.arange(held.shape[1])]
            better = side * ends > side * best
            best[better] = ends[better]
            where[better] = np.asarray(rows)[places[better]]
        size = np.where(finite, np.abs(values), 0.0)
        self.total += size.sum(axis=0)
        self.nonzero += (size > 0).sum(axis=0)
        self.rows += len(rows)

    def close(self) -> None:
        """Adds the client to the summary of all clients."""
        self._ranges.add(self._name, self)


def _quantiles(sample: Floats) -> tuple[Floats, Floats, Floats]:
    """Returns the 5th, 50th and 95th percentile of each column, without NaN; 0 of empty ones."""
    shares = [0.05, 0.5, 0.95]
    missing = np.isnan(sample)
    found: Floats = np.quantile(np.where(missing, 0.0, sample), shares, axis=0)
    for column in np.flatnonzero(missing.any(axis=0)):
        values = sample[~missing[:, column], column]
        found[:, column] = np.quantile(values, shares) if len(values) else 0.0
    return found[0], found[1], found[2]


def _quiet_median(values: Floats, *, axis: int) -> Floats:
    """Returns the median along an axis without NaN; 0 where all are NaN."""
    empty = np.isnan(values).all(axis=axis, keepdims=True)
    found: Floats = np.nanmedian(np.where(empty, 0.0, values), axis=axis)
    return found
