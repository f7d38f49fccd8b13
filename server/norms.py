"""A bound on how far one update may move the model, so that no device decides a round alone.

The bound of a round follows from the updates that the round takes, in whatever order they came: it
is the same after a resume. Where it is their median, it is known once all are there; until then
they are added up as they come, and those that are longer are taken out of the exact sum again.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from fedcore.config import RunConfig
from fedcore.observability.words import counted
from fedcore.updates.pack import Vector
from server.aggregation.exact import Parts

FACTOR = 10.0
"""An update may be so many times as long as the median. Devices with much more data than others
take more steps, and their updates are longer: seldom by more. It bounds one round, and no device
that goes on: what lengthens the others' next updates lengthens the bound."""
LEAST = 3
"""Among fewer updates nobody can tell which one is wrong."""
_CHUNK = 1 << 16
_NAMED = 5  # clients that a note names


@dataclass(frozen=True)
class NormBound:
    """How a round bounds its updates."""

    base: Vector
    """The weights that were sent, shape ``(D,)``."""
    fixed: float | None
    """The bound; None where it is `FACTOR` times the median."""

    def limit(self, lengths: Sequence[float]) -> float | None:
        """The bound for updates of these lengths; None where there is none."""
        if self.fixed is not None:
            return self.fixed
        if len(lengths) < LEAST:
            return None
        some = sorted(length for length in lengths if length > 0)
        if not some:
            return None
        # Where most updates change nothing, the shortest other one is the measure, if two are.
        least = some[0] if len(some) > 1 else 0.0
        return FACTOR * (statistics.median(lengths) or least)

    def moved(self, parts: Parts, scale: float) -> Iterator[Vector]:
        """Weights that come by parts, moved towards the base.

        Guarantee:
            Their distance to it is ``scale`` times as long, up to rounding to float32.
        """
        place = 0
        for part in parts():
            for start in range(0, len(part), _CHUNK):
                piece = part[start : start + _CHUNK]
                own = self.base[place : place + len(piece)]
                gap = np.subtract(piece, own, dtype=np.float64)
                yield (own + gap * scale).astype(np.float32)
                place += len(piece)

    def note(self, number: int, clipped: Sequence[tuple[str, float]]) -> str:
        """Says whose updates a round clipped, and how long they were."""
        shown = [f"{name} ({length:.3g})" for name, length in sorted(clipped)[:_NAMED]]
        more = ", ..." if len(clipped) > _NAMED else ""
        why = (
            f"federation.max_update_norm = {self.fixed:g}"
            if self.fixed is not None
            else f"{FACTOR:g} times the median of the round"
        )
        return (
            f"round {number}: {counted(len(clipped), 'update')} longer than {why}, clipped to "
            f"that: {', '.join(shown)}{more}. Look at such a device, and revoke it if it goes on."
        )


def is_bounded(run: RunConfig, *, live: bool) -> bool:
    """Whether a run bounds its updates; ``live`` says whether they come from devices."""
    setting = run.federation.max_update_norm
    return not (run.client_private or setting == "none" or (setting == "adaptive" and not live))


def norm_bound(run: RunConfig, base: Vector, *, live: bool) -> NormBound | None:
    """The bound of a round that starts from ``base``; None where the run has none."""
    setting = run.federation.max_update_norm
    if not is_bounded(run, live=live):
        return None
    return NormBound(base, setting if isinstance(setting, float) else None)
