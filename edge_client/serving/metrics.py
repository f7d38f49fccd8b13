"""Counts and latencies of what is served, in Prometheus' text format."""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from fedcore.artifacts.feedback import LATENCY_BOUNDS_S, Observation
from fedcore.artifacts.golden import AnyArray
from fedcore.errors import FedcoreError, RequestRefused

if TYPE_CHECKING:
    from edge_client.serving.batching import ServedVersion

Tensors = Mapping[str, AnyArray]
Observe = Callable[["ServedVersion", Tensors, Tensors], None]
"""Takes a batch: the version that answered, inputs and outputs; none if the model failed."""


class Histogram:
    """Counts of durations by bucket. Its owner locks it."""

    def __init__(self) -> None:
        """Starts empty."""
        self.counts = [0] * (len(LATENCY_BOUNDS_S) + 1)
        self.total_s = 0.0

    def add(self, seconds: float) -> None:
        """Counts one duration."""
        self.counts[bisect_left(LATENCY_BOUNDS_S, seconds)] += 1
        self.total_s += seconds

    def lines(self, name: str, labels: str) -> Iterable[str]:
        """Yields the histogram's lines; ``labels`` such as ``model="digits"``."""
        below = 0
        for bound, count in zip((*map(repr, LATENCY_BOUNDS_S), "+Inf"), self.counts, strict=True):
            below += count
            yield f'{name}_bucket{{{labels},le="{bound}"}} {below}'
        yield f"{name}_sum{{{labels}}} {self.total_s:.6f}"
        yield f"{name}_count{{{labels}}} {below}"


class ModelMetrics:
    """Counters of one model; safe to use from several threads."""

    def __init__(self, observe: Observe | None = None) -> None:
        """Starts at zero; ``observe`` sees each batch and its outputs, to count them in bins."""
        self._lock = threading.Lock()
        self._observe = observe
        self._latency = Histogram()
        self._compute = Histogram()
        self._requests = 0
        self._rows = 0
        self._batches = 0
        self._refused: Counter[str] = Counter()
        self._swaps = 0

    def ran(
        self,
        version: ServedVersion,
        inputs: Tensors,
        outputs: Tensors,
        began_s: float,
        ended_s: float,
        arrived_s: Sequence[float],
    ) -> None:
        """Counts a batch: when it began and ended, and when each of its requests had arrived."""
        rows = len(next(iter(inputs.values())))
        with self._lock:
            self._requests += len(arrived_s)
            self._rows += rows
            self._batches += 1
            self._compute.add(ended_s - began_s)
            for since_s in arrived_s:
                self._latency.add(ended_s - since_s)
        if self._observe is not None:
            self._observe(version, inputs, outputs)

    def left(self, version: ServedVersion, inputs: Tensors) -> None:
        """Tells who observes of a request on which the model failed; `failed` counts it."""
        if self._observe is not None:
            self._observe(version, inputs, {})

    def failed(self, error: FedcoreError) -> None:
        """Counts a request that got an error."""
        reason = error.reason if isinstance(error, RequestRefused) else "failed"
        with self._lock:
            self._refused[reason] += 1

    def swapped(self) -> None:
        """Counts a change of version."""
        with self._lock:
            self._swaps += 1

    def totals(self) -> dict[str, int]:
        """Returns the counters: answered, refused and failed requests, rows, batches, swaps."""
        with self._lock:
            failed = self._refused["failed"]
            return {
                "requests": self._requests,
                "failed": failed,
                "refused": self._refused.total() - failed,
                "rows": self._rows,
                "batches": self._batches,
                "swaps": self._swaps,
            }

    def observed(self) -> Observation:
        """Returns requests that reached the model, those that failed in it, and latencies."""
        with self._lock:
            failed = self._refused["failed"]
            return Observation(
                requests=self._requests + failed,
                errors=failed,
                latency=tuple(self._latency.counts),
            )

    def samples(
        self, model: str, version: int | None, waiting: int, psi: float | None = None
    ) -> dict[str, list[str]]:
        """Returns the lines of each metric, without its ``# TYPE`` line."""
        label = f'model="{model}"'
        with self._lock:
            refused = [
                f'fedcore_refused_total{{{label},reason="{reason}"}} {count}'
                for reason, count in sorted(self._refused.items())
            ]
            return {
                "fedcore_requests_total": [f"fedcore_requests_total{{{label}}} {self._requests}"],
                "fedcore_refused_total": refused,
                "fedcore_rows_total": [f"fedcore_rows_total{{{label}}} {self._rows}"],
                "fedcore_batches_total": [f"fedcore_batches_total{{{label}}} {self._batches}"],
                "fedcore_swaps_total": [f"fedcore_swaps_total{{{label}}} {self._swaps}"],
                "fedcore_queue_requests": [f"fedcore_queue_requests{{{label}}} {waiting}"],
                "fedcore_model_version": [f"fedcore_model_version{{{label}}} {version or 0}"],
                "fedcore_latency_seconds": list(
                    self._latency.lines("fedcore_latency_seconds", label)
                ),
                "fedcore_compute_seconds": list(
                    self._compute.lines("fedcore_compute_seconds", label)
                ),
                "fedcore_drift_psi": []
                if psi is None
                else [f"fedcore_drift_psi{{{label}}} {psi:.6g}"],
            }


_METRICS = {
    "fedcore_requests_total": ("counter", "Requests that the model answered."),
    "fedcore_refused_total": ("counter", "Requests that got an error, by reason."),
    "fedcore_rows_total": ("counter", "Rows that the model answered."),
    "fedcore_batches_total": ("counter", "Batches that the model ran."),
    "fedcore_swaps_total": ("counter", "Changes of the version that answers."),
    "fedcore_queue_requests": ("gauge", "Requests that wait."),
    "fedcore_model_version": ("gauge", "The version that answers, 0 if none does."),
    "fedcore_latency_seconds": ("histogram", "From a request's arrival to its outputs."),
    "fedcore_compute_seconds": ("histogram", "Time of a batch in the model."),
    "fedcore_drift_psi": ("gauge", "Population stability index of the most shifted feature."),
}


def exposition(models: Iterable[Mapping[str, Sequence[str]]]) -> str:
    """Returns Prometheus' text format of several models' `ModelMetrics.samples`."""
    every = list(models)
    lines = []
    for name, (kind, help_text) in _METRICS.items():
        found = [line for samples in every for line in samples.get(name, ())]
        if found:
            lines += [f"# HELP {name} {help_text}", f"# TYPE {name} {kind}", *found]
    return "\n".join(lines) + "\n"
