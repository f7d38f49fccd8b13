"""Follows a model in a store: answers with whichever version is the active one.

Imports neither torch nor Flower.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from types import TracebackType

from edge_client.delivery.store import Record, read_record, serving
from edge_client.inference.process import ModelLimits
from edge_client.model import EdgeModel
from fedcore.artifacts.golden import AnyArray
from fedcore.errors import FedcoreError

POLL_S = 0.5
_RETRY_S = 5.0
"""Pause before a version that could not be loaded is tried again, which costs a process."""


@dataclass(frozen=True)
class VersionedOutputs:
    """An answer, and the version of the model that gave all of it.

    Example::

        answer = fedcore.follow_model("device-store", "digits").run({"input": batch})
        answer.version, answer.outputs["output"]
    """

    version: int
    outputs: Mapping[str, AnyArray] = field(repr=False)
    """An array ``(B, ...)`` for each output."""


class LiveModel:
    """The active version of a model, whichever it is at the moment. Thread-safe.

    A new version is loaded, tried and warmed up beside the one that answers, and then takes its
    place by one reference. As a context manager it looks for a new version twice a second.

    Guarantee:
        Each call is answered by one version from start to end, and no call waits for a new version.
        While a new version cannot be loaded, the one before keeps answering, and `fault` says why.

    Example::

        with fedcore.follow_model("device-store", "digits") as model:
            model.current.predict(x)
            model.run({"input": batch}).version  # of this answer
    """

    def __init__(
        self, store: Path, name: str, *, threads: int | None, limits: ModelLimits, rows: int = 1
    ) -> None:
        """Opens and loads the version that serves now.

        Args:
            store: The store that updates install to.
            name: The model's name.
            threads: Threads of one inference; None for what is fastest on this machine.
            limits: Time and memory of a call to a model that runs in a process with limits.
            rows: Most rows of a call that run as one batch, where rows don't affect each other (see
                `edge_client.inference.engine.Engine.warm_up`).

        Raises:
            FedcoreError: no version can be opened or loaded (see `fedcore.open_model`).
        """
        self._store, self._name = store, name
        self._threads, self._limits, self._rows = threads, limits, rows
        self._refreshing = threading.Lock()
        self._refused: Record | None = None
        self._stop = threading.Event()
        self._watcher: threading.Thread | None = None
        self.fault = ""
        """Why the active version does not answer; empty if it does."""
        self._current = self._loaded()
        self.fault = self._current.damage or ""

    @property
    def current(self) -> EdgeModel:
        """The version that answers now. A caller that keeps it stays with this version."""
        return self._current

    def run(self, inputs: Mapping[str, AnyArray]) -> VersionedOutputs:
        """Computes outputs for a batch with the version that answers now.

        Args:
            inputs: An array ``(B, ...)`` for each input, of exactly its type and shape.

        Raises:
            FedcoreError: see `edge_client.inference.engine.Engine.run`.
        """
        model = self._current
        return VersionedOutputs(model.version, model.engine.run(inputs))

    def refresh(self) -> bool:
        """Moves to the active version, if that is another; returns whether it did.

        Reads a file of 200 bytes when nothing has changed. Never raises for a version that cannot
        be loaded: see `fault`.
        """
        with self._refreshing:
            try:
                active = read_record(self._store, self._name, "active")
                if active in (self._current.installed.record, self._refused):
                    if active != self._refused:
                        self.fault = ""
                    return False
                loaded = self._loaded()
            except FedcoreError as error:
                self.fault = str(error)
                return False
            self.fault = loaded.damage or ""
            # A damaged version stays refused until another is activated: it was read once.
            self._refused = active if loaded.installed.record != active else None
            if loaded.installed.record == self._current.installed.record:
                return False
            # Calls that are under way keep the version before, whose process ends after them.
            self._current = loaded
            return True

    def close(self) -> None:
        """Stops looking for new versions, and drops the one that answers."""
        self._stop.set()
        if self._watcher is not None:
            self._watcher.join()
        self._current.engine.close()

    def __enter__(self) -> LiveModel:
        self._watcher = threading.Thread(target=self._watch, name="model", daemon=True)
        self._watcher.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _watch(self) -> None:
        while not self._stop.wait(_RETRY_S if self.fault else POLL_S):
            self.refresh()

    def _loaded(self) -> EdgeModel:
        model = EdgeModel(serving(self._store, self._name), self._threads, self._limits)
        model.engine.warm_up(rows=self._rows)
        return model


def follow_model(
    store: str | PathLike[str],
    name: str,
    *,
    threads: int | None = None,
    limits: ModelLimits | None = None,
) -> LiveModel:
    """Opens an installed model, to be answered by whichever version is active.

    Needs only the base package: imports neither torch nor Flower.

    Example::

        with fedcore.follow_model("device-store", "digits") as live:
            live.current.predict(x)

    Args:
        store: The store that `fedcore.update_model` installs to.
        name: The model's name.
        threads: Threads of one inference; None for what is fastest on this machine.
        limits: Time and memory that one call may use in a process with limits; when None, 120
            seconds, and memory by the size of the model.

    Returns:
        The model, loaded. ``refresh`` moves to a new version; within ``with`` it happens by itself.

    Raises:
        FedcoreError: no version can be opened or loaded (see `fedcore.open_model`).
    """
    return LiveModel(Path(store), name, threads=threads, limits=limits or ModelLimits())
