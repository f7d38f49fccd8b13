"""Counts what is served in the bins of the release's reference, beside the thread that answers.

The thread that answers only keeps a reference to a batch's arrays; twice a second another one
counts. Under more load than `MAX_WAITING_ROWS` in between, further rows are not looked at.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from edge_client.delivery.observed import (
    WINDOW_S,
    ServedWindow,
    ServedWindows,
    read_observed,
    write_observed,
)
from edge_client.delivery.store import Record
from edge_client.serving.metrics import Tensors
from fedcore.artifacts.feedback import MAX_ROWS, MIN_ROWS, Observation, fits, pooled, shifts
from fedcore.artifacts.reference import BinnedFeature, Reference, Values, binned, measured, ragged
from fedcore.observability.foreign import foreign

if TYPE_CHECKING:
    from edge_client.serving.batching import ServedVersion

log = logging.getLogger("fedcore.serving")

MAX_WAITING_ROWS = 256
"""Most rows that wait to be counted: 512 a second are looked at."""
MAX_BYTES = 8 << 20
"""Bytes of arrays that wait to be counted, beyond which no other batch is kept: 8 MiB."""


class Sample(NamedTuple):
    """Rows of a batch, with the version that answered them; no outputs if it failed on them."""

    version: ServedVersion
    inputs: Tensors
    outputs: Tensors


class Sampler:
    """Rows of a model that wait to be counted. Safe to use from several threads."""

    def __init__(self) -> None:
        """Starts empty."""
        self._lock = threading.Lock()
        self._clear()

    def _clear(self) -> None:
        self._samples: list[Sample] = []
        self._left_rows, self._left_bytes = MAX_WAITING_ROWS, MAX_BYTES

    def add(
        self,
        version: ServedVersion,
        inputs: Tensors,
        outputs: Tensors,
    ) -> None:
        """Keeps the arrays of a batch, whose rows are counted as far as there is room."""
        with self._lock:
            if self._left_rows > 0 and self._left_bytes > 0:
                self._left_rows -= len(next(iter(inputs.values())))
                for tensors in (inputs, outputs):
                    self._left_bytes -= sum(array.nbytes for array in tensors.values())
                self._samples.append(Sample(version, inputs, outputs))

    def take(self) -> list[Sample]:
        """Returns what waits, and forgets it."""
        with self._lock:
            found = self._samples
            self._clear()
        return found


@dataclass
class Observer:
    """The windows of one version of a model. For one thread at a time."""

    store: Path
    model: str
    record: Record
    reference: Reference | None
    totals: Observation
    """Requests and latencies of the model that are counted, or are not this version's."""
    clock: Callable[[], float] = time.time
    rng: np.random.Generator = field(default_factory=np.random.default_rng)
    """Draws the places of tokens."""

    def __post_init__(self) -> None:
        """Continues the windows that an earlier server has left of this version."""
        found = read_observed(self.store, self.model, self.record)
        if found is not None and not self._fits(found.current):
            found = None
        self.observed = found or ServedWindows(record=self.record, current=self._opened())
        self._saved = found
        self._warned = False

    def count(self, samples: list[Sample], totals: Observation) -> None:
        """Counts rows, and the requests since the last call; ends the window when it is time."""
        window = self.observed.current
        if samples or totals != self.totals:
            room = min(MAX_WAITING_ROWS, MAX_ROWS - window.observation.rows)
            answered, self.totals = _since(totals, self.totals), totals
            found = pooled([window.observation, *self._counted(samples, room), answered])
            window = window.model_copy(update={"observation": found})
        age_s = self.clock() - window.opened_s
        # A clock that was set back would keep a window open for as long.
        found = window.observation
        if max(found.rows, found.requests) >= MIN_ROWS and not 0 <= age_s < WINDOW_S:
            self._put(ended=window, current=self._opened())
        elif window is not self.observed.current:
            self._put(current=window)

    def _put(self, **windows: ServedWindow) -> None:
        self.observed = self.observed.model_copy(update=windows)

    def save(self) -> None:
        """Writes the windows to the store, if they have changed.

        Raises:
            ResourceError: they cannot be written.
        """
        if self.observed is not self._saved:
            self._saved = self.observed
            write_observed(self.store, self.model, self.observed)

    def psi(self) -> float | None:
        """Returns the index of the most shifted feature; None while there are too few rows."""
        found = self.observed.latest.observation
        if self.reference is None or found.rows < MIN_ROWS:
            return None
        return max(each.psi for each in shifts(self.reference, found))

    def _counted(self, samples: list[Sample], room: int) -> list[Observation]:
        """Returns the counts of the first ``room`` rows."""
        if self.reference is None:
            return []
        return [
            self._counts(self.reference, inputs, outputs)
            for inputs, outputs in _stacked(samples, room)
        ]

    def _counts(self, reference: Reference, inputs: Tensors, outputs: Tensors) -> Observation:
        rows = len(next(iter(inputs.values())))
        counts: list[tuple[int, ...]] = []
        for side, tensors in (("input", inputs), ("output", outputs)):
            features: list[BinnedFeature] = [one for one in reference.features if one.side == side]
            if features:
                values = self._measured(features, tensors, reference, rows)
                edges = [one.edges for one in features]
                counts += ragged(binned(values, edges), edges)
        return Observation(rows=rows, counts=tuple(counts))

    def _measured(
        self, features: list[BinnedFeature], tensors: Tensors, reference: Reference, rows: int
    ) -> Values:
        """Returns the features of rows, missing where they cannot be measured.

        Such rows are counted as well: otherwise their number, which is told without noise, would
        depend on what is in them.
        """
        missing = np.full((rows, len(features)), np.nan)
        if not tensors:
            return missing
        try:
            return measured(features, tensors, reference.presentation, self.rng)
        except (IndexError, KeyError, ValueError) as error:  # signed, and still not of this model
            if not self._warned:
                log.warning(
                    "serve: %s version %d: its reference does not fit it (%s); what does not fit "
                    "counts as missing",
                    self.model,
                    self.record.version,
                    foreign(error, 200),
                )
            self._warned = True
            return missing

    def _fits(self, window: ServedWindow) -> bool:
        if self.reference is None:
            return not window.observation.counts
        return not window.observation.rows or fits(self.reference, window.observation)

    def _opened(self) -> ServedWindow:
        return ServedWindow(id=secrets.token_hex(8), opened_s=self.clock())


def _stacked(samples: list[Sample], room: int) -> list[tuple[Tensors, Tensors]]:
    """Returns the first ``room`` rows, in one batch for all that have one shape."""
    batches: dict[tuple[object, ...], list[tuple[Tensors, Tensors]]] = {}
    for _, inputs, outputs in samples:
        rows = min(room, len(next(iter(inputs.values()))))
        if rows > 0:
            room -= rows
            first = tuple(
                {name: array[:rows] for name, array in tensors.items()}
                for tensors in (inputs, outputs)
            )
            form = tuple((name, a.shape[1:]) for each in first for name, a in each.items())
            batches.setdefault(form, []).append((first[0], first[1]))
    return [
        (_joined([one for one, _ in batch]), _joined([other for _, other in batch]))
        for batch in batches.values()
    ]


def _joined(parts: list[Tensors]) -> Tensors:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _since(now: Observation, before: Observation) -> Observation:
    """Returns the requests and latencies that were counted after ``before``."""
    return Observation(
        requests=now.requests - before.requests,
        errors=now.errors - before.errors,
        latency=tuple(one - other for one, other in zip(now.latency, before.latency, strict=True)),
    )
