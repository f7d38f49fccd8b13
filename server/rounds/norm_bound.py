"""A bound on how far one update may move the model, so that no device decides a round alone.

The bound of a round follows from the updates that the round takes, in whatever order they came, and
from the records of the rounds before: it is the same after a resume. Where it is the updates'
median, it is known once all are there; until then they are added up as they come, and those that
are longer are taken out of the exact sum again.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from fedcore.config.run import RunConfig
from fedcore.observability.words import counted
from fedcore.updates.pack import Vector
from server.records import RoundRecord
from server.rounds.aggregation.exact_mean import Parts

FACTOR = 10.0
"""An update may be so many times as long as the median. Devices with much more data than others
take more steps, and their updates are longer: seldom by more. It bounds one round: what lengthens
the others' next updates lengthens their median."""
GROWTH = 2.0
"""A round's median counts for so many times the median of all rounds before it at most. Half of all
rounds must be longer before that one is: the bound can double once in twice as many rounds, and not
from one round to the next, whatever devices do together. Honest updates are longest in the first
rounds, and one that grows later has a factor of 20 to grow by before it is clipped."""
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
    """The bound; None where it follows from medians."""
    usual: float | None = None
    """The median of what earlier rounds counted as their medians (see `measure`); None where there
    was none."""

    def limit(self, lengths: Sequence[float]) -> float | None:
        """The bound for updates of these lengths; None where there is none."""
        if self.fixed is not None:
            return self.fixed
        measure = self._most if len(lengths) < LEAST else self.measure(lengths)
        return None if measure is None else FACTOR * measure

    def measure(self, lengths: Sequence[float]) -> float | None:
        """What the round counts as the median of its updates' lengths.

        None where the bound is fixed, where there are too few updates to have a say, or where none
        of them changed anything.
        """
        some = sorted(length for length in lengths if length > 0)
        if self.fixed is not None or len(lengths) < LEAST or not some:
            return None
        # Where most updates change nothing, the shortest other one is the measure, if two are.
        least = some[0] if len(some) > 1 else 0.0
        found = statistics.median_low(lengths) or least  # half of them may be made up
        return found if self._most is None else min(found, self._most)

    @property
    def _most(self) -> float | None:
        return None if self.usual is None else GROWTH * self.usual

    def lacks(self, updates: int) -> bool:
        """Whether so many updates are too few to bound one of them."""
        return 0 < updates < LEAST and self.fixed is None and self.usual is None

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
        why = f"{FACTOR:g} times the median of the round, or of rounds so far"
        if self.fixed is not None:
            why = f"federation.max_update_norm = {self.fixed:g}"
        return (
            f"round {number}: {counted(len(clipped), 'update')} longer than {why}, clipped to "
            f"that: {', '.join(shown)}{more}. Look at such a device, and revoke it if it goes on."
        )


def is_bounded(run: RunConfig, *, live: bool) -> bool:
    """Whether a run bounds its updates; ``live`` says whether they come from devices."""
    setting = run.federation.max_update_norm
    return not (run.client_private or setting == "none" or (setting == "adaptive" and not live))


def norm_bound(
    run: RunConfig, base: Vector, *, live: bool, records: Sequence[RoundRecord] = ()
) -> NormBound | None:
    """The bound of a round that starts from ``base``; None where the run has none.

    ``records`` are of the rounds that are over.
    """
    setting = run.federation.max_update_norm
    if not is_bounded(run, live=live):
        return None
    if isinstance(setting, float):
        return NormBound(base, setting)
    found = [each.median_norm for each in records if each.median_norm]
    # The lower one of two: a bound that is a little short is a round's, one too long stays.
    return NormBound(base, None, statistics.median_low(found) if found else None)
