"""The models that a device serves: each follows the store, and has a queue of its own."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from edge_client.delivery.health import ServedCounts, write_served
from edge_client.delivery.store import Record, check_name, models, read_record
from edge_client.serving.batching import Batcher, QueueLimits, ServedVersion
from edge_client.serving.messages import ModelDescription, ModelStatus
from edge_client.serving.metrics import ModelMetrics
from edge_client.serving.observing import Observer, Sampler
from fedcore.errors import DataError, DeviceError, FedcoreError, RequestRefused, ResourceError
from fedcore.observability.foreign import foreign

MAX_MODELS = 256
_AGAIN_S, _MOST_AGAIN_S = 2.0, 300.0
"""How long after a failure to open a version it is tried again; twice as long each time."""
Opener = Callable[[Path, str], ServedVersion]
"""Opens the version of a model in a store that serves now."""


@dataclass
class Served:
    """A model: the version that answers, its queue and its counters."""

    name: str
    metrics: ModelMetrics
    sampler: Sampler
    """Rows that wait for ``observer``."""
    current: ServedVersion | None = None
    record: Record | None = None
    """What ``active`` named when a version was last opened, or could not be."""
    answering: Record | None = None
    """What ``active`` named when the version that answers was opened."""
    before: tuple[int, int] = (0, 0)
    """Requests and failures before the version that answers did."""
    failures: int = 0
    """How often in a row the active version could not be opened."""
    again_s: float = 0.0
    """When it is tried again, by the clock of `Models`."""
    batcher: Batcher | None = None
    fault: str = ""
    """Why the active version does not answer; empty if it does."""
    told: int = 0
    """Requests that the agent on this device has been told of."""
    unloaded: bool = False
    """Whether an operator has taken the model out of service."""
    observer: Observer | None = None
    """Counts in bins what the version that answers is asked; None before one answers."""

    def version(self) -> ServedVersion:
        """Returns the version that answers; raises `RequestRefused` if none does."""
        if self.current is None:
            raise RequestRefused(
                f"model {self.name!r} is not served now: {self.fault or 'it is not loaded'}. "
                "Nothing was answered.",
                "unavailable",
            )
        return self.current

    def psi(self) -> float | None:
        """Returns the stability index of the most shifted feature; None if it is not known."""
        return None if self.observer is None else self.observer.psi()

    def status(self) -> ModelStatus:
        """Returns the model's row in the repository's index."""
        if self.current is None:
            reason = self.fault or "unloaded"
            return ModelStatus(self.name, "", "UNAVAILABLE", foreign(reason, 300))
        return ModelStatus(self.name, str(self.current.version), "READY", foreign(self.fault, 300))


@dataclass
class Models:
    """The models of one store. Lookups may be made by any thread, while `refresh` replaces them."""

    store: Path
    names: tuple[str, ...] | None
    """The models to serve; None for all that are installed."""
    opener: Opener
    limits: QueueLimits
    clock: Callable[[], float] = time.monotonic
    _served: dict[str, Served] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def open(self) -> None:
        """Opens the models.

        Raises:
            ConfigError: a name is not valid.
            DeviceError: no model is installed.
            FedcoreError: a model that was named cannot be served.
        """
        for name in self._wanted():
            check_name(name)
            self.refresh_one(name)
            if self.names is not None:
                self._served[name].version()
        if not self._served:
            raise DeviceError(
                f"{self.store}: no model is installed. Nothing was started; install one with "
                "`fedcore device update`."
            )

    def _wanted(self) -> Sequence[str]:
        return (models(self.store) if self.names is None else self.names)[:MAX_MODELS]

    def refresh(self) -> list[str]:
        """Opens what has been activated since the last call; returns a line for each change."""
        return [line for name in self._wanted() if (line := self.refresh_one(name))]

    def tell(self) -> None:
        """Tells the agent on this device how requests went; it returns from versions that fail.

        A store that this user may not write is left as it is: then nobody is told.
        """
        self.count()
        for served in self.served():
            if served.observer is not None:
                with suppress(ResourceError):
                    served.observer.save()
            asked, failed = _counted(served)
            if served.answering is None or asked == served.told:
                continue
            # A request of the version before that ends now is counted here: one batch at most.
            counts = ServedCounts(
                record=served.answering,
                requests=asked - served.before[0],
                errors=failed - served.before[1],
            )
            with suppress(ResourceError):  # told again later, with what comes until then
                write_served(self.store, served.name, counts)
                served.told = asked

    def count(self) -> None:
        """Counts in bins the rows that have been answered since the last call."""
        for served in self.served():
            observer, samples = served.observer, served.sampler.take()
            if observer is not None:
                now = [one for one in samples if one.version is served.current]
                observer.count(now, served.metrics.observed())

    def refresh_one(self, name: str) -> str:
        """Opens the model's active version if it is another one than what answers.

        The version before answers until the new one is open, and continues to if it cannot be
        opened; then it is tried again later, as what was wrong may pass: an update under way, or
        no memory. Returns a line for the log; empty if nothing has changed.
        """
        with self._lock:
            served = self._served.get(name)
            if served is None:
                sampler = Sampler()
                served = Served(name, ModelMetrics(sampler.add), sampler)
                self._served[name] = served
            if served.unloaded:
                return ""
            try:
                record = read_record(self.store, name, "active")
            except DataError as error:
                return self._note(served, str(error))
            if record != served.record:
                served.record, served.failures = record, 0
            elif not served.failures or self.clock() < served.again_s:
                return ""
            try:
                version = self.opener(self.store, name)
            except Exception as error:  # the other models must go on being followed
                wait_s = min(_AGAIN_S * 2 ** min(served.failures, 16), _MOST_AGAIN_S)
                served.failures, served.again_s = served.failures + 1, self.clock() + wait_s
                ours = isinstance(error, FedcoreError)
                fault = str(error) if ours else f"{type(error).__name__}: {foreign(error)}"
                return self._note(served, fault)
            served.failures, served.answering = 0, record
            served.before = _counted(served)
            if served.observer is None or served.observer.record != record:
                before = served.metrics.observed()
                served.observer = Observer(self.store, name, record, version.reference, before)
            return self._replace(served, version)

    def _note(self, served: Served, fault: str) -> str:
        if fault == served.fault:
            return ""
        served.fault = fault
        return f"{served.name}: {fault}"

    def _replace(self, served: Served, version: ServedVersion) -> str:
        before, served.current, served.fault = served.current, version, ""
        if served.batcher is None:
            served.batcher = Batcher(served.version, self.limits, served.metrics)
        served.batcher.start()
        if before is None:
            return f"{served.name}: version {version.version} answers"
        served.metrics.swapped()
        return f"{served.name}: version {version.version} answers in place of {before.version}"

    def get(self, name: str, version: str = "") -> Served:
        """Returns a served model.

        Raises:
            RequestRefused: there is no such model, it is not loaded, or another version answers.
        """
        served = self._served.get(name)
        if served is None:
            raise RequestRefused(
                f"model {foreign(name, 64)!r} is not served here. Nothing was answered; "
                "v2/models/NAME names one of: " + foreign(", ".join(sorted(self._served)), 200),
                "unknown",
            )
        current = served.version()
        if version and version != str(current.version):
            raise RequestRefused(
                f"model {name!r}: version {foreign(version, 32)} is not served, version "
                f"{current.version} is. Nothing was answered; ask for no version to be answered "
                "by the current one.",
                "unknown",
            )
        return served

    def describe(self, name: str, version: str = "") -> ModelDescription:
        """Returns a model's metadata; raises `RequestRefused` as `get` does."""
        current = self.get(name, version).version()
        return ModelDescription(name, str(current.version), current.inputs, current.outputs)

    def index(self, *, ready: bool = False) -> list[ModelStatus]:
        """Returns the state of every model, or of those that answer."""
        rows = [served.status() for _, served in sorted(self._served.items())]
        return [row for row in rows if row.state == "READY" or not ready]

    def served(self) -> list[Served]:
        """Returns every model, by name."""
        return [served for _, served in sorted(self._served.items())]

    def all_ready(self) -> bool:
        """Returns whether every model that was not unloaded answers."""
        return all(served.current or served.unloaded for served in self.served())

    def load(self, name: str) -> None:
        """Opens a model again, from the store.

        Raises:
            RequestRefused: it is not installed, or cannot be served.
        """
        if name not in self._wanted():
            raise RequestRefused(
                f"load: model {foreign(name, 64)!r} is not installed. Nothing was changed.",
                "unknown",
            )
        with self._lock:
            if (served := self._served.get(name)) is not None:
                served.unloaded, served.record = False, None
        self.refresh_one(name)
        self.get(name)

    def unload(self, name: str) -> None:
        """Takes a model out of service until it is loaded; what waits is still answered.

        Raises:
            RequestRefused: there is no such model.
        """
        with self._lock:
            served = self._served.get(name)
            if served is None:
                raise RequestRefused(
                    f"unload: model {foreign(name, 64)!r} is not served. Nothing was changed.",
                    "unknown",
                )
            batcher, served.batcher = served.batcher, None
            served.unloaded, served.fault = True, "unloaded by an operator"
            if batcher is not None:
                batcher.stop()
            served.current = None

    def run_waiting(self) -> None:
        """Runs the requests that quick models have got; the others' threads run theirs."""
        for served in list(self._served.values()):
            batcher = served.batcher
            if batcher is not None and batcher.inline and len(batcher):
                batcher.run_waiting()

    def stop(self) -> None:
        """Answers what waits, and serves nothing more."""
        for served in self.served():
            if served.batcher is not None:
                served.batcher.stop()


def _counted(served: Served) -> tuple[int, int]:
    """Returns the requests that reached the model since the start, and those that failed."""
    totals = served.metrics.totals()
    return totals["requests"] + totals["failed"], totals["failed"]
