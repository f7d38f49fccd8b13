"""Versions that a device holds back: one that its health made it leave, or that failed a self-test.

::

    models/MODEL/held    the version, and why

A held version is not installed again by itself, so a device does not move back and forth between
two versions. A newer version ends it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from edge_client.delivery import store as installed
from edge_client.delivery.state_file import read_state
from edge_client.delivery.store import Record
from fedcore.errors import DeviceError
from fedcore.files import write_json
from fedcore.rpc.delivery import MAX_REASON, reason_text

_MAX_BYTES = 8192


class HeldVersion(BaseModel):
    """A version that is not to be installed, and why: the content of ``held``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    record: Record
    outcome: Literal["refused", "returned"]
    """``refused`` by the self-test, or ``returned`` from it after it had served."""
    reason: Annotated[str, Field(max_length=MAX_REASON)]


def read_held(store: Path, model: str) -> HeldVersion | None:
    """Returns the version of a model that is held back; None if none is.

    Raises:
        DataError: the file cannot be read.
    """
    return read_state(
        _path(store, model),
        HeldVersion,
        max_bytes=_MAX_BYTES,
        what="the version held back",
        remedy="Remove the file to try the newest version again.",
    )


def hold(store: Path, model: str, record: Record, outcome: str, reason: str) -> HeldVersion:
    """Holds a version back, durably.

    Raises:
        DiskFull: there was no room.
    """
    held = HeldVersion.model_validate(
        {"record": record, "outcome": outcome, "reason": reason_text(reason)}
    )
    write_json(_path(store, model), held.model_dump(mode="json"))
    return held


def release_held(store: Path, model: str) -> None:
    """Forgets that a version was held back."""
    _path(store, model).unlink(missing_ok=True)


def return_to_previous(store: Path, model: str, reason: str) -> Record:
    """Makes the version before serve again, and holds the active one back.

    Guarantee:
        A version serves at every moment. The active version is held back, durably, before the one
        before takes its place: after a crash in between, `finish_return` does the rest.

    Args:
        store: The device's store.
        model: The model's name.
        reason: Why the active version must not serve.

    Returns:
        The version that serves now.

    Raises:
        DeviceError: there is no intact earlier version, or an update is running.
        DataError: the record of a version is damaged.
        DiskFull: there was no room.
    """
    with installed.locked(store):
        active = installed.read_record(store, model, "active")
        before = installed.read(store, model, "previous")  # checks every byte
        if before.record == active:
            raise DeviceError(
                f"model {model!r}: there is no earlier version to return to. Version "
                f"{active.version} keeps serving."
            )
        hold(store, model, active, "returned", reason)
        installed.write_slot(store, model, "active", before.record)
        return before.record


def finish_return(store: Path, model: str) -> None:
    """Completes a return that was interrupted after the active version was held back.

    Raises:
        DeviceError: there is no intact earlier version, or an update is running.
        DataError: the record of a version is damaged.
        DigestMismatch: the earlier version is damaged.
    """
    held = read_held(store, model)
    if held is None or held.outcome != "returned":
        return
    if installed.read_record(store, model, "active") == held.record:
        return_to_previous(store, model, held.reason)


def _path(store: Path, model: str) -> Path:
    return store / "models" / model / "held"
