"""What a server on this device has counted of a version: ``health/MODEL.observed``.

Counts are kept by windows of time: each row is in one window, and each window is told once. The
agent of ``fedcore device run`` keeps in ``health/MODEL.told`` what it tells of the latest.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from edge_client.delivery.state_file import read_state
from edge_client.delivery.store import Record
from fedcore.artifacts.feedback import MIN_ROWS, Observation
from fedcore.errors import DataError
from fedcore.files import disk_errors, lock_file, write_json

WINDOW_S = 3600.0
"""Seconds that a window takes at least; then it ends with its 100th row."""
MAX_EARLIER = 256
"""Earlier windows that are remembered: ten days of one an hour."""
_MAX_BYTES = 1 << 18


class ServedWindow(BaseModel):
    """Counts of some time."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]
    opened_s: float
    """When it began, by the system's clock."""
    observation: Observation = Observation()


class ServedWindows(BaseModel):
    """The windows of the version that answers, or that answered last."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    record: Record
    current: ServedWindow
    ended: ServedWindow | None = None
    """The latest complete window; None before the first has ended."""

    @property
    def latest(self) -> ServedWindow:
        """The window that says most: the current one, once it has rows enough."""
        enough = self.current.observation.rows >= MIN_ROWS
        return self.current if enough or self.ended is None else self.ended


class ToldWindow(BaseModel):
    """What the agent tells the server of a window: ``health/MODEL.told``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    window: str
    observation: Observation
    """What may leave this device of it."""
    arrived: bool = False
    earlier: Annotated[tuple[str, ...], Field(max_length=MAX_EARLIER)] = ()
    """Windows that were told before, oldest first: two servers on one store may name one again."""


def read_observed(store: Path, model: str, record: Record) -> ServedWindows | None:
    """Returns what was counted of a version; None if nothing was, or it cannot be read."""
    path = _path(store, model, "observed")
    try:
        found = read_state(path, ServedWindows, max_bytes=_MAX_BYTES, what="counts of use")
    except DataError:  # damaged counts are missing ones: they only inform
        return None
    return found if found is not None and found.record == record else None


def write_observed(store: Path, model: str, observed: ServedWindows) -> None:
    """Keeps what was counted, for the agent and for a later server.

    Raises:
        DiskFull: there was no room.
    """
    path = _path(store, model, "observed")
    write_json(path, observed.model_dump(mode="json"), mode=0o640)


def read_told(store: Path, model: str) -> ToldWindow | None:
    """Returns what was last told, or is to be; None if nothing was.

    Raises:
        DataError: it cannot be read.
    """
    path = _path(store, model, "told")
    return read_state(path, ToldWindow, max_bytes=_MAX_BYTES, what="what was told of a window")


def telling(store: Path, model: str) -> AbstractContextManager[None]:
    """Locks what is told of a model, while it is decided: two agents must not draw noise each.

    Raises:
        ResourceError: the lock cannot be made.
    """
    path = _path(store, model, "telling")
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    return lock_file(path)


def write_told(store: Path, model: str, told: ToldWindow) -> None:
    """Keeps what is to be told, durably.

    Raises:
        DiskFull: there was no room.
    """
    write_json(_path(store, model, "told"), told.model_dump(mode="json"), mode=0o640)


def _path(store: Path, model: str, kind: str) -> Path:
    return store / "health" / f"{model}.{kind}"
