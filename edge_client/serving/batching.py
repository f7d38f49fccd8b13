"""Micro-batching: requests that wait for a model run together, in order of arrival.

The queue is bounded, and what does not fit is refused at once. By default nothing waits for
company: a batch is what has arrived while the model ran.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from edge_client.serving.metrics import ModelMetrics
from edge_client.serving.protocol import TensorSpec
from fedcore.artifacts.golden import AnyArray
from fedcore.artifacts.reference import Reference
from fedcore.errors import DataError, DeviceError, FedcoreError, LimitExceeded, RequestRefused
from fedcore.observability.foreign import foreign

log = logging.getLogger("fedcore.serving")


class ServedVersion(Protocol):
    """One version of a model, open and ready to run; safe to use from several threads."""

    @property
    def version(self) -> int:
        """The version's number."""

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """Names, types and shapes of its inputs."""

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """Names, types and shapes of its outputs."""

    @property
    def rows_together(self) -> int:
        """Most rows that run as one batch; 1 where a row's outputs would depend on the others."""

    @property
    def reference(self) -> Reference | None:
        """What inputs and outputs were like at the release; None if it does not say."""

    @property
    def quick(self) -> bool:
        """Whether the largest batch takes less time than is worth a change of threads."""

    def card(self) -> dict[str, Any]:
        """Returns what a person who tries the model needs to know, as JSON values."""

    def run(self, inputs: Mapping[str, AnyArray]) -> dict[str, AnyArray]:
        """Returns the outputs of a batch of any number of rows.

        Raises:
            DataError: a number is not one that the model takes, such as NaN.
            FedcoreError: the model failed.
        """


Answer = tuple[str, Mapping[str, AnyArray]]
"""The version that computed the outputs, and the outputs."""


@dataclass(slots=True)
class QueuedRequest:
    """A request that waits for the model."""

    inputs: Mapping[str, AnyArray]
    rows: int
    done: Callable[[Answer | FedcoreError], None]
    """Called once, by any thread, with the outcome; must not block or raise."""
    version: str = ""
    """The version that must answer; any if empty."""
    deadline_s: float | None = None
    """By the batcher's clock."""
    arrived_s: float = 0.0
    received_bytes: int = 0
    """Length of the message that the inputs may refer to, with what else its sender put there."""

    def held_bytes(self) -> int:
        """Returns the memory that the request takes while it waits."""
        return max(self.received_bytes, sum(array.nbytes for array in self.inputs.values()))

    def key(self) -> tuple[object, ...]:
        """Returns what requests must have in common to run together."""
        return self.version, *((name, array.shape[1:]) for name, array in self.inputs.items())


@dataclass(frozen=True, kw_only=True)
class QueueLimits:
    """Bounds of a model's queue."""

    max_batch: int = 64
    """Most rows that run together."""
    max_queue: int = 1024
    """Most requests that wait."""
    max_queue_bytes: int = 256 << 20
    """Most bytes of requests that wait."""
    max_delay_s: float = 0.0
    """How long a request may wait for others to run with."""


class Batcher:
    """The queue of one model. `submit` may be called by any thread."""

    def __init__(
        self,
        current: Callable[[], ServedVersion],
        limits: QueueLimits,
        metrics: ModelMetrics,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Creates an empty queue.

        Args:
            current: Returns the version that answers; read once for each batch, so that no batch
                is answered by two versions.
            limits: Bounds.
            metrics: Counts and times what is done.
            clock: Returns monotonic seconds.
        """
        self._current = current
        self._limits = limits
        self._metrics = metrics
        self._clock = clock
        self._waiting: deque[QueuedRequest] = deque()
        self._bytes = 0
        self._running = threading.Lock()
        self._changed = threading.Condition()
        self._stopped = False
        self._worker: threading.Thread | None = None

    def __len__(self) -> int:
        """Returns the number of requests that wait."""
        return len(self._waiting)

    def submit(self, job: QueuedRequest) -> None:
        """Adds a request to the queue.

        Raises:
            RequestRefused: the queue is full, or the model is no longer served.
        """
        size = job.held_bytes()
        limits = self._limits
        with self._changed:
            if self._stopped:
                raise RequestRefused(
                    "the model is not served any more. Nothing was answered; send the request to "
                    "another server.",
                    "unavailable",
                )
            full = len(self._waiting) >= limits.max_queue
            if full or (self._waiting and self._bytes + size > limits.max_queue_bytes):
                raise RequestRefused(
                    f"the queue is full: {len(self._waiting)} requests of {self._bytes} bytes "
                    "wait. Nothing was answered; send the request again later, or with fewer at "
                    "a time.",
                    "overloaded",
                )
            job.arrived_s = self._clock()
            self._waiting.append(job)
            self._bytes += size
            if self._worker is not None:
                self._changed.notify()

    @property
    def inline(self) -> bool:
        """Whether the thread that has submitted requests should run them, by `run_waiting`."""
        return self._worker is None

    def start(self) -> None:
        """Starts the thread that runs requests, unless it runs or the model is quick without it.

        To be called for each new version, which may be slower than the one before.

        A model that runs in microseconds is done before another thread has woken up; a slow one
        must not keep a transport's thread from other models and from health checks.
        """
        if self._worker is not None or (self._limits.max_delay_s == 0 and self._current().quick):
            return
        self._worker = threading.Thread(target=self._work, name="batcher", daemon=True)
        self._worker.start()

    def stop(self) -> None:
        """Refuses new requests, answers those that wait, and ends the thread."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        if self._worker is not None:
            self._worker.join()
        self.run_waiting()

    def run_waiting(self) -> None:
        """Runs requests until none waits; returns at once if another thread is doing so."""
        # A thread looks at the queue again after it has released the lock: none is left waiting.
        while self._waiting and self._running.acquire(blocking=False):
            try:
                while jobs := self._take():
                    self._run(jobs)
            finally:
                self._running.release()

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._waiting and not self._stopped:
                    self._changed.wait()
                if not self._waiting:
                    return
                self._wait_for_company()
            self.run_waiting()

    def _wait_for_company(self) -> None:
        """Waits until a batch is full or the first request has waited long enough."""
        limits = self._limits
        while not self._stopped and self._waiting:
            first = self._waiting[0]
            left_s = first.arrived_s + limits.max_delay_s - self._clock()
            if left_s <= 0 or sum(job.rows for job in self._waiting) >= limits.max_batch:
                return
            self._changed.wait(left_s)

    def _take(self) -> list[QueuedRequest]:
        """Takes the next requests that may run together."""
        with self._changed:
            if not self._waiting:
                return []
            jobs = [self._waiting.popleft()]
            rows = jobs[0].rows
            most = min(self._limits.max_batch, self._most_rows())
            if self._waiting and rows < most:
                key = jobs[0].key()
                while self._waiting:
                    following = self._waiting[0]
                    rows += following.rows
                    if rows > most or following.key() != key:
                        break
                    jobs.append(self._waiting.popleft())
            if self._waiting:
                self._bytes -= sum(job.held_bytes() for job in jobs)
            else:
                self._bytes = 0
            return jobs

    def _most_rows(self) -> int:
        try:
            return self._current().rows_together
        except FedcoreError:  # unloaded meanwhile: `_run` says so to each
            return 1

    def _run(self, jobs: list[QueuedRequest]) -> None:
        now_s = self._clock()
        try:
            version = self._current()
        except FedcoreError as error:
            self._fail(jobs, error)
            return
        jobs = [job for job in jobs if self._admits(job, version, now_s)]
        if not jobs:
            return
        stacked = _stack(jobs)
        try:
            outputs = _checked(version.run(stacked), sum(job.rows for job in jobs))
        except FedcoreError as error:
            self._separate(jobs, version, error)
            return
        except Exception as error:  # this thread answers other requests, too
            log.error("serve: a batch failed: %s: %s", type(error).__name__, foreign(error))
            what = "internal error; see the server's log. Nothing was answered."
            self._fail(jobs, RequestRefused(what, "failed"))
            return
        arrived_s = [job.arrived_s for job in jobs]
        self._metrics.ran(version, stacked, outputs, now_s, self._clock(), arrived_s)
        number = str(version.version)
        if len(jobs) == 1:
            jobs[0].done((number, outputs))
            return
        start = 0
        for job in jobs:
            end = start + job.rows
            job.done((number, {name: array[start:end] for name, array in outputs.items()}))
            start = end

    def _admits(self, job: QueuedRequest, version: ServedVersion, now_s: float) -> bool:
        if job.deadline_s is not None and now_s >= job.deadline_s:
            late = RequestRefused(
                "the request's deadline passed while it waited. Nothing was answered; allow more "
                "time, or send fewer at a time.",
                "late",
            )
            self._fail([job], late)
            return False
        if job.version and job.version != str(version.version):
            gone = RequestRefused(
                f"version {job.version} is not served, version {version.version} is. Nothing was "
                "answered; ask for no version to be answered by the current one.",
                "unknown",
            )
            self._fail([job], gone)
            return False
        return True

    def _separate(
        self, jobs: list[QueuedRequest], version: ServedVersion, error: FedcoreError
    ) -> None:
        """Refuses the requests that the model does not take or fails on, and runs the others.

        Whether a request is answered must not depend on others that happened to come with it.
        """
        if len(jobs) > 1:
            for job in jobs:
                self._run([job])
            return
        if not isinstance(error, DataError):
            self._metrics.left(version, jobs[0].inputs)
        self._fail(jobs, failure(error))

    def _fail(self, jobs: list[QueuedRequest], error: FedcoreError) -> None:
        for job in jobs:
            self._metrics.failed(error)
            job.done(error)


def failure(error: FedcoreError) -> RequestRefused:
    """Returns what the sender of a request is told of an error of the model."""
    if isinstance(error, RequestRefused):
        return error
    if isinstance(error, LimitExceeded):
        return RequestRefused(str(error), "too_large")
    return RequestRefused(str(error), "invalid" if isinstance(error, DataError) else "failed")


def _stack(jobs: list[QueuedRequest]) -> Mapping[str, AnyArray]:
    if len(jobs) == 1:
        return jobs[0].inputs
    return {name: np.concatenate([job.inputs[name] for job in jobs]) for name in jobs[0].inputs}


def _checked(outputs: dict[str, AnyArray], rows: int) -> dict[str, AnyArray]:
    """Returns outputs, if they have a row for each input."""
    if any(array.ndim == 0 or len(array) != rows for array in outputs.values()):
        raise DeviceError(
            f"the model's outputs do not have the {rows} rows of its inputs. Nothing was answered."
        )
    return outputs
