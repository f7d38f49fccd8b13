"""On-disk store of a device's installed models.

::

    models/MODEL/VERSION/{manifest.json,model.onnx,golden.safetensors}
    models/MODEL/EPOCH.VERSION/...    the same files, if the epoch is not 0
    models/MODEL/active      the version that serves, and the digest of its manifest
    models/MODEL/previous    the version that served before: the fallback
    models/MODEL/held        a version that is not to be installed (`edge_client.delivery.held`)
    incoming/MODEL/          unfinished fetches of its latest offer
    trust/                   trusted state (`edge_client.delivery.trust`)
    tuning/                  settings measured here (`edge_client.inference.tuning`)
    health/                  measurements of serving versions (`edge_client.delivery.health`)
    outbox.json              reports for the server (`edge_client.delivery.outbox`)

A version is complete before ``active`` names it, and ``active`` is replaced atomically.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from fedcore.artifacts.golden import MAX_GOLDEN_BYTES
from fedcore.artifacts.manifest import (
    MAX_MANIFEST_BYTES,
    MAX_MODEL_BYTES,
    FileEntry,
    Manifest,
    parse_manifest,
)
from fedcore.config.run import Name
from fedcore.errors import ConfigError, DataError, DeviceError, DigestMismatch, TrustError
from fedcore.files import (
    ABANDONED_S,
    lock_file,
    name_exists,
    read_bytes,
    remove,
    remove_unfinished,
    remove_unfinished_below,
    sha256_hex,
    sync_folder,
    write_atomic,
    write_json,
)

Slot = Literal["active", "previous"]
_MAX_RECORD_BYTES = 1024  # bytes: a version and a digest
_REPAIR = "Run `fedcore device update` to fetch it again."


class Record(BaseModel):
    """Content of ``active`` and ``previous``: a version, and the SHA-256 of its manifest."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    version: int
    manifest_sha256: str
    epoch: int = 0
    """A version of a later epoch is newer, whatever its number."""

    @property
    def folder(self) -> str:
        """Name of the version's folder, with the epoch: two epochs may each have a version 3."""
        return f"{self.epoch}.{self.version}" if self.epoch else str(self.version)


@dataclass(frozen=True)
class Installed:
    """A version in the store whose every byte was checked when it was read."""

    manifest: Manifest
    record: Record
    path: Path
    """The ONNX file, which an update may remove at any time."""
    golden: bytes = field(repr=False)
    damage: str | None = None
    """Why this older version serves in place of the active one; None if it is the active one."""
    tuning: Path | None = None
    """The store's folder of settings that were measured here; None to measure none."""


def check_name(model: str) -> None:
    """Raises `ConfigError` unless ``model`` is a valid name, as it becomes a folder's name."""
    try:
        TypeAdapter(Name).validate_python(model)
    except ValidationError:
        raise ConfigError(
            f"model {model!r}: expected 1 to 64 of a-z, 0-9, '-' and '_', starting with a letter "
            "or digit. Nothing was done."
        ) from None


@contextmanager
def locked(store: Path) -> Iterator[None]:
    """Locks the store for one update, and removes what a killed process left half-written.

    The kernel releases the lock when the process ends.

    Raises:
        DeviceError: another update is running.
        DataError: the lock's path is not a regular file.
    """
    store.mkdir(parents=True, exist_ok=True)
    busy = DeviceError(
        f"{store}: another update of this store is in progress. Nothing was done; run again when "
        "it has ended."
    )
    with lock_file(store / ".lock", busy):
        remove_unfinished_below(store / "models")
        remove_unfinished(store / "trust")
        remove_unfinished(store, "outbox.json", idle_s=ABANDONED_S)
        for name in ("health", "tuning"):  # a server of the model writes there without the lock
            remove_unfinished(store / name, idle_s=ABANDONED_S)
        yield


def models(store: Path) -> list[str]:
    """Returns the names of all installed models, intact or damaged."""
    return sorted(path.name for path in (store / "models").glob("*") if _parts(path))


def serving(store: Path, model: str) -> Installed:
    """Returns the version to serve: the active one, or the previous one if that is damaged.

    Raises:
        ConfigError: ``model`` is not a valid name.
        DeviceError: no version is installed.
        DigestMismatch: the active version is damaged, and no intact previous version exists.
    """
    check_name(model)
    if not _parts(_folder(store, model)):
        raise DeviceError(
            f"{store}: no version of model {model!r} is installed. Nothing was answered; run "
            "`fedcore device update` to install one."
        )
    try:
        return read(store, model, "active")
    except (DigestMismatch, TrustError, DataError) as error:
        damage = str(error)
    try:
        before = read(store, model, "previous")
    except (DigestMismatch, TrustError, DataError) as error:
        raise DigestMismatch(
            f"{damage} There is no intact earlier version to fall back to ({error})"
        ) from error
    return replace(before, damage=damage)


def read_record(store: Path, model: str, slot: Slot) -> Record:
    """Reads which version a slot names.

    Raises:
        DataError: the slot is empty or damaged.
    """
    path = _slot(store, model, slot)
    raw = read_bytes(path, max_bytes=_MAX_RECORD_BYTES, what=f"the record of the {slot} version")
    try:
        return Record.model_validate_json(raw)
    except ValidationError:
        raise DataError(
            f"{path}: its contents are not the version and digest that were written; the disk "
            f"may be failing. {_REPAIR}"
        ) from None


def read(store: Path, model: str, slot: Slot) -> Installed:
    """Reads and checks the version that a slot names.

    Guarantee:
        Every byte is as installed: the manifest has the digest of the record, and the other files
        have the digests of the manifest.

    Raises:
        DataError: the slot is empty or damaged, or a file is missing.
        DigestMismatch: a file has changed since it was installed.
        TrustError: the manifest cannot be read.
    """
    record = read_record(store, model, slot)
    folder = _folder(store, model) / record.folder
    path = folder / "manifest.json"
    raw = read_bytes(path, max_bytes=MAX_MANIFEST_BYTES, what="an installed manifest")
    _check_digest(path, raw, record.manifest_sha256)
    manifest = parse_manifest(raw)
    onnx = folder / "model.onnx"
    _read_file(onnx, manifest.onnx, MAX_MODEL_BYTES)  # only checked: the child process reads it
    golden = _read_file(folder / "golden.safetensors", manifest.golden, MAX_GOLDEN_BYTES)
    return Installed(manifest, record, onnx, golden, tuning=store / "tuning")


@contextmanager
def staged(store: Path, model: str, manifest: bytes, onnx: Path, golden: Path) -> Iterator[Path]:
    """Assembles a version in a temporary folder, which is removed unless `activate` renames it.

    Args:
        store: Locked by the caller.
        model: The model's name.
        manifest: The manifest's bytes as signed.
        onnx: A fetched and verified ONNX file; moved into the folder.
        golden: A fetched and verified golden file; moved into the folder.

    Raises:
        DiskFull: there was no room; the folder is removed.
    """
    place = _folder(store, model)
    place.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=place, prefix=".staged-"))
    try:
        folder.chmod(0o755)  # another user may serve the model
        write_atomic(folder / "manifest.json", manifest)
        onnx.rename(folder / "model.onnx")
        golden.rename(folder / "golden.safetensors")
        sync_folder(folder)
        yield folder
    finally:
        if folder.exists():
            remove(folder)


def activate(store: Path, model: str, folder: Path, record: Record, before: Record | None) -> None:
    """Makes a staged version the active one, and removes all others except ``before``.

    Args:
        store: Locked by the caller.
        model: The model's name.
        folder: Folder from `staged`, checked and self-tested; renamed to its final place.
        record: The new content of ``active``.
        before: The version that served until now, kept as the fallback; None if there was none.

    Raises:
        DiskFull: there was no room; the version before continues to serve.
    """
    place = _folder(store, model)
    final = place / record.folder
    if name_exists(final):  # damaged, or left by an interrupted activation
        final.rename(place / f".replaced-{folder.name}")
    folder.rename(final)
    sync_folder(place)
    if before is not None:
        write_slot(store, model, "previous", before)
    write_slot(store, model, "active", record)
    keep = {kept.folder for kept in (record, before) if kept}
    for path in place.iterdir():
        if path.is_dir() and path.name not in keep:
            remove(path)


def write_slot(store: Path, model: str, slot: Slot, record: Record) -> None:
    """Names the version of a slot, durably. The version is complete, and the store locked.

    Raises:
        DiskFull: there was no room; the slot is unchanged.
    """
    write_json(_slot(store, model, slot), record.model_dump(exclude_defaults=True))


def _read_file(path: Path, entry: FileEntry, max_bytes: int) -> bytes:
    raw = read_bytes(path, max_bytes=max_bytes, what="an installed file")
    _check_digest(path, raw, entry.sha256)
    return raw


def _check_digest(path: Path, raw: bytes, expected: str) -> None:
    if (got := sha256_hex(raw)) != expected:
        raise DigestMismatch(
            f"{path}: it has changed since it was installed: expected sha256 {expected}, got "
            f"{got}. It is not served. {_REPAIR}"
        )


def _parts(folder: Path) -> list[str]:
    """Lists a model's folder, without the hidden leftovers of interrupted updates."""
    if not folder.is_dir():
        return []
    return [path.name for path in folder.iterdir() if not path.name.startswith(".")]


def _folder(store: Path, model: str) -> Path:
    return store / "models" / model


def _slot(store: Path, model: str, slot: Slot) -> Path:
    return _folder(store, model) / slot
