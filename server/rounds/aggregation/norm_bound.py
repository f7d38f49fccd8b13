"""Bound on the norm of one update's difference, so that no single device determines a round.

The bound depends only on the updates that a round accepts, in any order, and on the records of
earlier rounds, so a resumed round computes the same one. Where it derives from the updates' median,
it is known only after the last update. Until then updates are added to the exact sum, and those
that exceed the bound are subtracted again.
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

MEDIAN_FACTOR = 10.0
"""Bound on an update's length, in medians. Devices with much more data take more steps and send
longer updates, seldom longer than this. It bounds a single round: updates that lengthen the
others' next updates raise their median, too."""
MAX_GROWTH = 2.0
"""Most that a round's median counts for, in medians of all earlier rounds. That median rises
only after half of all rounds were longer, so the bound can double once in twice as many rounds,
not between consecutive rounds, even if devices collude. Honest updates are longest in the first
rounds; one that grows later can grow by a factor of 20 before it is clipped."""
MIN_UPDATES = 3
"""Smallest number of updates among which a false one can be identified."""
_CHUNK = 1 << 16
_NAMED = 5  # names shown in a note


@dataclass(frozen=True)
class NormBound:
    """Rule that bounds the updates of a round."""

    base: Vector
    """The weights that were sent, shape ``(D,)``."""
    fixed: float | None
    """The bound as set in the configuration; None where it follows from medians."""
    earlier_median: float | None = None
    """Median of the `measure` of earlier rounds; None where none has one."""

    def limit(self, lengths: Sequence[float]) -> float | None:
        """Returns the bound for updates of these lengths; None where none can be derived."""
        if self.fixed is not None:
            return self.fixed
        measure = self._largest_measure if len(lengths) < MIN_UPDATES else self.measure(lengths)
        return None if measure is None else MEDIAN_FACTOR * measure

    def measure(self, lengths: Sequence[float]) -> float | None:
        """Returns the round's median update length, capped at `MAX_GROWTH` times `earlier_median`.

        None where the bound is fixed, where there are fewer than `MIN_UPDATES` updates, or where
        all are zero; 0 where only one is not zero.
        """
        some = sorted(length for length in lengths if length > 0)
        if self.fixed is not None or len(lengths) < MIN_UPDATES or not some:
            return None
        # Where most updates are zero, use the shortest other one, if there are two or more.
        least = some[0] if len(some) > 1 else 0.0
        found = statistics.median_low(lengths) or least  # robust: up to half of them may be false
        return found if self._largest_measure is None else min(found, self._largest_measure)

    def scale(self, length: float, limit: float | None) -> float:
        """Returns the factor by which `clipped_parts` clips an update to ``limit``."""
        return 1.0 if limit is None or length <= limit else limit / length

    @property
    def _largest_measure(self) -> float | None:
        return None if self.earlier_median is None else MAX_GROWTH * self.earlier_median

    def is_undetermined(self, updates: int) -> bool:
        """Whether no bound can be derived for this many updates."""
        return 0 < updates < MIN_UPDATES and self.fixed is None and self.earlier_median is None

    def clipped_parts(self, parts: Parts, scale: float) -> Iterator[Vector]:
        """Yields weights part by part, moved towards the base.

        Guarantee:
            Their distance to the base is multiplied by ``scale``, up to rounding to float32.
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
        """Returns a note on the clients whose updates were clipped, with the updates' lengths."""
        shown = [f"{name} ({length:.3g})" for name, length in sorted(clipped)[:_NAMED]]
        more = ", ..." if len(clipped) > _NAMED else ""
        why = f"{MEDIAN_FACTOR:g} times the median of the round, or of rounds so far"
        if self.fixed is not None:
            why = f"federation.max_update_norm = {self.fixed:g}"
        return (
            f"round {number}: {counted(len(clipped), 'update')} longer than {why}, clipped to "
            f"that: {', '.join(shown)}{more}. Check these devices, and revoke them if this "
            "continues."
        )


def is_bounded(run: RunConfig, *, live: bool) -> bool:
    """Whether a run bounds its updates; ``live`` specifies that they come from devices."""
    setting = run.federation.max_update_norm
    return not (run.client_private or setting == "none" or (setting == "adaptive" and not live))


def norm_bound(
    run: RunConfig, base: Vector, *, live: bool, records: Sequence[RoundRecord] = ()
) -> NormBound | None:
    """Returns the bound of a round that starts from ``base``; None where the run has none.

    ``records`` are those of the completed rounds.
    """
    setting = run.federation.max_update_norm
    if not is_bounded(run, live=live):
        return None
    if isinstance(setting, float):
        return NormBound(base, setting)
    found = [each.median_norm for each in records if each.median_norm]
    # The lower median: a bound slightly too low affects one round, one too high persists.
    return NormBound(base, None, statistics.median_low(found) if found else None)
