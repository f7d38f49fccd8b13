"""What a device tells of a version that it serves: counts alone, never an input or an answer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from fedcore.artifacts.reference import MAX_BINS, MAX_FEATURES, Reference
from fedcore.artifacts.stability import MODERATE, Reading, chance, psi, reading

LATENCY_BOUNDS_S = (
    *(1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0),
)
"""Upper bounds of the buckets of latency, in seconds; the last bucket has none."""
MIN_ROWS = 100
"""Rows below which a device tells nothing of them."""
MAX_ROWS = 100_000
"""Rows of a window after which no more are counted: more would tell nothing new."""
_Number = Annotated[int, Field(ge=0, lt=2**53)]
_Count = Annotated[int, Field(gt=-(2**53), lt=2**53)]


class Observation(BaseModel):
    """Counts of what one version answered in some time."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    rows: _Number = 0
    """Rows that were counted in bins."""
    counts: Annotated[
        tuple[Annotated[tuple[_Count, ...], Field(max_length=MAX_BINS)], ...],
        Field(max_length=MAX_FEATURES),
    ] = ()
    """Rows in each bin of each feature of the release's reference; empty if they are not told."""
    requests: _Number = 0
    """Requests that reached the model, with those that failed in it."""
    errors: _Number = 0
    latency: Annotated[tuple[_Number, ...], Field(max_length=len(LATENCY_BOUNDS_S) + 1)] = ()
    """Answered requests by latency, see `LATENCY_BOUNDS_S`."""
    noise_deviation: Annotated[float, Field(ge=0, le=1e9)] = 0.0
    """Standard deviation of the noise on each of ``counts``."""


@dataclass(frozen=True)
class FeatureShift:
    """How far one feature has moved from what it was at the release.

    Example::

        [each.feature for each in drift.features if each.reading == "shifted"]
    """

    feature: str
    """Such as ``input[3]``, ``age[0]``, ``input mean`` or ``output class``."""
    psi: float
    """Population stability index."""
    chance: float
    """The index that stays below this where nothing has moved, at so many rows."""
    reading: Reading
    """``stable`` below 0.1 or within chance, ``moderate`` to 0.25, ``shifted`` above."""


def shift_text(shift: FeatureShift) -> str:
    """Returns a feature's index and reading on one line."""
    explained = shift.reading == "stable" and shift.psi >= MODERATE
    return f"{shift.feature}: {shift.psi:.3f}, {shift.reading}{', by chance' if explained else ''}"


def fits(reference: Reference, observation: Observation) -> bool:
    """Returns whether an observation has a count for each bin of a reference."""
    return [len(row) for row in observation.counts] == [
        len(each.counts) for each in reference.features
    ]


def shifts(reference: Reference, observation: Observation) -> tuple[FeatureShift, ...]:
    """Returns how far each feature has moved, in the order of the reference; empty without counts.

    Args:
        reference: The release's.
        observation: One that `fits` it.
    """
    found = []
    for feature, row in zip(reference.features, observation.counts, strict=True):
        index = psi(feature.counts, row)
        by_chance = chance(feature.counts, row, noise_deviation=observation.noise_deviation)
        found.append(FeatureShift(feature.label, index, by_chance, reading(index, by_chance)))
    return tuple(found)


def pooled(observations: Iterable[Observation]) -> Observation:
    """Returns the sum of observations, whose counts have one shape or are empty."""
    every = list(observations)
    told = [each for each in every if each.counts]
    counts = tuple(
        tuple(int(one) for one in np.sum(rows, axis=0))
        for rows in zip(*(each.counts for each in told), strict=True)
    )
    buckets = len(LATENCY_BOUNDS_S) + 1
    latency = [0] * buckets
    for each in every:
        for place, number in enumerate(each.latency):
            latency[place] += number
    return Observation(
        rows=sum(each.rows for each in told),
        counts=counts,
        requests=sum(each.requests for each in every),
        errors=sum(each.errors for each in every),
        latency=tuple(latency),
        noise_deviation=sum(each.noise_deviation**2 for each in told) ** 0.5,
    )


def latency_us(counts: Sequence[int], share: float) -> float | None:
    """Returns the upper bound of the bucket that holds a quantile of latency, in microseconds.

    None without requests, or if it is in the last bucket, which has no bound.
    """
    total, below = sum(counts), 0
    for bound_s, count in zip(LATENCY_BOUNDS_S, counts, strict=False):
        below += count
        if total and below >= share * total:
            return 1e6 * bound_s
    return None


def latency_text(bound_us: float | None) -> str:
    """Returns a quantile of latency in words, from the upper bound of its bucket."""
    return "unknown" if bound_us is None else f"up to {bound_us:g} us"
