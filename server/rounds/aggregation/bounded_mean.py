"""`BoundedMean`: adds updates up as they arrive, and clips those that exceed the round's bound."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from server.rounds.aggregation.interface import Aggregate, WeightedUpdate
from server.rounds.aggregation.mean import StreamedMean
from server.rounds.aggregation.norm_bound import NormBound


class BoundedMean:
    """An `Aggregation` that keeps an exact weighted sum of clipped updates.

    Where the bound depends on all updates, each is added whole on arrival. Once the bound is known,
    those that exceed it are subtracted again and added clipped; they must stay readable until then.
    An update that would make the sum use more memory is not added until the bound is known: clipped
    to the bound, it is usually small.
    """

    def __init__(self, total: StreamedMean, bound: NormBound) -> None:
        """Creates one that adds to ``total``, an empty sum."""
        self._total = total
        self._bound = bound
        self._held: list[tuple[WeightedUpdate, bool]] = []
        """Updates that the bound is not known for yet, and whether each has been added."""
        self._clipped: list[tuple[int, float]] = []

    def add(self, update: WeightedUpdate) -> None:
        """Adds an update, clipped where the bound is fixed."""
        if self._bound.fixed is not None:
            self._add(update, self._scale(update, self._bound.fixed))
            return
        early = self._total.has_room(update)
        if early:
            self._total.add(update)
        self._held.append((update, early))

    def merge(self, other: BoundedMean) -> None:
        """Takes over all updates of another one with the same bound."""
        self._total.merge(other._total)
        self._held += other._held
        self._clipped += other._clipped

    def result(self) -> Aggregate:
        """Clips what exceeds the bound, and returns the mean."""
        lengths = [update.found.distance or 0.0 for update, _ in self._held]
        limit, late = self._bound.limit(lengths), list[tuple[WeightedUpdate, float]]()
        for update, early in self._held:
            scale = self._scale(update, limit)
            if early and scale < 1.0:
                self._total.subtract(update)
            if scale < 1.0 or not early:
                late.append((update, scale))
        for update, scale in late:  # after every `subtract`: the sum may take more limbs now
            self._add(update, scale)
        found = self._total.result()
        return replace(found, clipped=self._clipped, median_norm=self._bound.measure(lengths))

    def _add(self, update: WeightedUpdate, scale: float) -> None:
        if scale < 1.0:
            clipped_parts = partial(self._bound.clipped_parts, update.found.parts, scale)
            self._total.add_clipped(update, clipped_parts)
        else:
            self._total.add(update)

    def _scale(self, update: WeightedUpdate, limit: float | None) -> float:
        length = update.found.distance or 0.0
        scale = self._bound.scale(length, limit)
        if scale < 1.0:
            self._clipped.append((update.node, length))
        return scale
