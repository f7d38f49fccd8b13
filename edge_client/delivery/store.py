"""What a device has installed.

::

    models/MODEL/VERSION/{manifest.json,model.onnx,golden.safetensors}
    models/MODEL/EPOCH.VERSION/...    likewise, where the epoch is not 0
    models/MODEL/active      the version that serves, and the digest of its manifest
    models/MODEL/previous    the one that served before, to fall back to
    incoming/                unfinished fetches
    trust/                   what this device believes (`edge_client.delivery.trust`)

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
    is_there,
    lock_file,
    read_bytes,
    remove,
    sha256_hex,
    sync_folder,
    write_atomic,
    write_json,
)

Slot = Literal["active", "previous"]
_MAX_RECORD_BYTES = 1024  # bytes: a version and a digest
_REPAIR = "`fedcore device update` fetches it again."


class Record(BaseModel):
    """Which version serves, and the digest that its manifest must have."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    version: int
    manifest_sha256: str
    epoch: int = 0
    """A version of a later epoch is newer, whatever its number."""

    @property
    def folder(self) -> str:
        """The name of the folder that holds it: two epochs may each have a version 3."""
        return f"{self.epoch}.{self.version}" if self.epoch else str(self.version)


@dataclass(frozen=True)
class Installed:
    """A version in the store, every byte of which was checked a moment ago."""

    manifest: Manifest
    record: Record
    path: Path
    """The model's file, which an update may take away at any time."""
    golden: bytes = field(repr=False)
    damage: str | None = None
    """Why the active version does not serve and this older one does; None when it is active."""


def check_name(model: str) -> None:
    """Raises `ConfigError` unless ``model`` is a model's name: it becomes a folder's."""
    try:
        TypeAdapter(Name).validate_python(model)
    except ValidationError:
        raise ConfigError(
            f"model {model!r}: expected 1 to 64 of a-z, 0-9, '-' and '_', starting with a letter "
            "or digit. Nothing was done."
        ) from None


@contextmanager
def locked(store: Path) -> Iterator[None]:
    """Keeps a second update out of the store; the kernel gives the lock back when we end.

    Raises:
        DeviceError: another update is at work.
        DataError: something else than a file has the name of the lock.
    """
    store.mkdir(parents=True, exist_ok=True)
    busy = DeviceError(
        f"{store}: another update is at work on this store. Nothing was done; run again when it "
        "has ended."
    )
    with lock_file(store / ".lock", busy):
        yield


def models(store: Path) -> list[str]:
    """The names of the models of which anything is installed, be it whole or not."""
    return sorted(path.name for path in (store / "models").glob("*") if _parts(path))


def serving(store: Path, model: str) -> Installed:
    """The version to serve: the active one, or the one before where the active is damaged.

    Raises:
        DeviceError: nothing is installed.
        DigestMismatch: what is installed is damaged, and there is nothing whole to fall back to.
    """
    check_name(model)
    if not _parts(_folder(store, model)):
        raise DeviceError(
            f"{store}: no version of model {model!r} is installed. Nothing can be answered; "
            "`fedcore device update` installs one."
        )
    try:
        return read(store, model, "active")
    except (DigestMismatch, TrustError, DataError) as error:
        damage = str(error)
    try:
        before = read(store, model, "previous")
    except (DigestMismatch, TrustError, DataError) as error:
        raise DigestMismatch(
            f"{damage} There is no whole version before it to fall back to ({error})"
        ) from error
    return replace(before, damage=damage)


def read_record(store: Path, model: str, slot: Slot) -> Record:
    """Which version a slot names.

    Raises:
        DataError: the slot is empty, or does not hold what was written there.
    """
    path = _slot(store, model, slot)
    raw = read_bytes(path, max_bytes=_MAX_RECORD_BYTES, what=f"the record of the {slot} version")
    try:
        return Record.model_validate_json(raw)
    except ValidationError:
        raise DataError(
            f"{path}: it does not hold a version and a digest as it was written; the disk may be "
            f"failing. {_REPAIR}"
        ) from None


def read(store: Path, model: str, slot: Slot) -> Installed:
    """Reads the version that a slot names.

    Guarantee:
        Every byte is what was installed: the manifest has the recorded digest, and the other files
        have those of the manifest.

    Raises:
        DataError: a file is missing.
        DigestMismatch: a file has changed since it was installed.
    """
    record = read_record(store, model, slot)
    folder = _folder(store, model) / record.folder
    path = folder / "manifest.json"
    raw = read_bytes(path, max_bytes=MAX_MANIFEST_BYTES, what="an installed manifest")
    _check_digest(path, raw, record.manifest_sha256)
    manifest = parse_manifest(raw)
    onnx = folder / "model.onnx"
    _read_file(onnx, manifest.onnx, MAX_MODEL_BYTES)  # checked here, and read where it runs
    golden = _read_file(folder / "golden.safetensors", manifest.golden, MAX_GOLDEN_BYTES)
    return Installed(manifest, record, onnx, golden)


@contextmanager
def staged(store: Path, model: str, manifest: bytes, onnx: Path, golden: Path) -> Iterator[Path]:
    """Puts fetched files together in a folder that goes away again unless it is activated.

    Args:
        store: Locked by the caller.
        model: Whose version it is.
        manifest: The manifest as signed.
        onnx: A fetched and verified file; it is moved.
        golden: Likewise.

    Raises:
        DiskFull: there was no room; nothing is left.
    """
    place = _folder(store, model)
    place.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=place, prefix=".staged-"))
    try:
        folder.chmod(0o755)  # whoever serves need not be whoever updates
        write_atomic(folder / "manifest.json", manifest)
        onnx.rename(folder / "model.onnx")
        golden.rename(folder / "golden.safetensors")
        sync_folder(folder)
        yield folder
    finally:
        if folder.exists():
            remove(folder)


def activate(store: Path, model: str, folder: Path, record: Record, before: Record | None) -> None:
    """Makes a staged version the one that serves, and removes all but the one before.

    Args:
        store: Locked by the caller.
        model: Whose version it is.
        folder: As `staged` yields it; checked and self-tested.
        record: What ``active`` will say.
        before: The version that serves until now; it is what `serving` falls back to.

    Raises:
        DiskFull: there was no room; the version before keeps serving.
    """
    place = _folder(store, model)
    final = place / record.folder
    if is_there(final):  # left by an activation that was interrupted, or damaged
        final.rename(place / f".replaced-{folder.name}")
    folder.rename(final)
    sync_folder(place)
    if before is not None:
        write_json(_slot(store, model, "previous"), before.model_dump(exclude_defaults=True))
    write_json(_slot(store, model, "active"), record.model_dump(exclude_defaults=True))
    keep = {kept.folder for kept in (record, before) if kept}
    for path in place.iterdir():
        if path.is_dir() and path.name not in keep:
            remove(path)


def _read_file(path: Path, entry: FileEntry, most_bytes: int) -> bytes:
    raw = read_bytes(path, max_bytes=most_bytes, what="an installed file")
    _check_digest(path, raw, entry.sha256)
    return raw


def _check_digest(path: Path, raw: bytes, expected: str) -> None:
    if (got := sha256_hex(raw)) != expected:
        raise DigestMismatch(
            f"{path}: it has changed since it was installed: expected sha256 {expected}, got "
            f"{got}. It is not served. {_REPAIR}"
        )


def _parts(folder: Path) -> list[str]:
    """What a model's folder holds, but for what an interrupted update has left in it."""
    if not folder.is_dir():
        return []
    return [path.name for path in folder.iterdir() if not path.name.startswith(".")]


def _folder(store: Path, model: str) -> Path:
    return store / "models" / model


def _slot(store: Path, model: str, slot: Slot) -> Path:
    return _folder(store, model) / slot
