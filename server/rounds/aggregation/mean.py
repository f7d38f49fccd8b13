"""`StreamedMean`: adds updates up as they arrive, so that memory does not grow with the cohort."""

from __future__ import annotations

import threading

from fedcore.updates.distance import COMPILED_FROM
from server.rounds.aggregation.exact_mean import AddScaled, ExactMean, Parts
from server.rounds.aggregation.interface import Aggregate, WeightedUpdate

_TOUCHED = 2**19
"""Model size in elements (4 MiB of sums) from which on allocating the sum's pages takes
noticeable time."""


class StreamedMean:
    """An `Aggregation` that keeps only an exact weighted sum."""

    def __init__(self, total: ExactMean) -> None:
        """Continues the sum ``total``, which may come from a worker."""
        self.total = total
        self._touching: threading.Thread | None = None

    @classmethod
    def awaiting(cls, size: int) -> StreamedMean:
        """Returns an empty one for updates of ``size`` elements that are still on their way.

        Meanwhile a thread allocates the memory of a large sum.
        """
        made = cls(ExactMean(size, _add_scaled() if size >= COMPILED_FROM else None))
        if size >= _TOUCHED:
            made._touching = threading.Thread(target=made.total.touch, name="touching", daemon=True)
            made._touching.start()
        return made

    def add(self, update: WeightedUpdate) -> None:
        """Adds an update to the sum, part by part."""
        self._wait()
        with update.readable():
            self.total.add_parts(update.found.parts, update.weight, peaks=update.found.peaks)

    def add_clipped(self, update: WeightedUpdate, parts: Parts) -> None:
        """Adds ``parts`` in place of an update's own weights."""
        self._wait()
        with update.readable():
            self.total.add_parts(parts, update.weight)

    def subtract(self, update: WeightedUpdate) -> None:
        """Subtracts an update that was added before. Sums are exact, so nothing of it is left."""
        assert update.found.peaks is not None
        with update.readable():
            self.total.subtract(update.found.parts, update.weight, peaks=update.found.peaks)

    def has_room(self, update: WeightedUpdate) -> bool:
        """Whether the sum takes no more memory with an update that is not clipped."""
        peaks = update.found.peaks
        return peaks is not None and self.total.has_room(peaks, update.weight)

    def merge(self, other: StreamedMean) -> None:
        """Adds the sum of another one."""
        self._wait()
        other._wait()
        if self.total.count:
            self.total.merge(other.total)
        else:
            self.total = other.total

    def result(self) -> Aggregate:
        """Returns the mean."""
        self._wait()
        return Aggregate(self.total)

    def _wait(self) -> None:
        if self._touching is not None:
            self._touching.join()
            self._touching = None


def _add_scaled() -> AddScaled:
    from fedcore.kernels.fixed_point import add_scaled

    return add_scaled
