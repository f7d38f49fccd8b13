"""A run's folder in one file, taken while the run goes on."""

from __future__ import annotations

import os
import sqlite3
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from fedcore.errors import DataError
from fedcore.files import disk_errors, sync_folder

_LEFT_OUT = {"incoming", "tensorboard"}
"""Payloads on their way, and what can be drawn again."""
_SQLITE = b"SQLite format 3\x00"
_BESIDE = ("-wal", "-shm", "-journal")
"""What SQLite keeps beside a database; a copy that it made itself needs none of them."""


@dataclass(frozen=True)
class BackedUp:
    """What a backup holds."""

    file: str
    files: int
    bytes: int
    created: str


def back_up(results: Path, file: Path, *, now: datetime) -> BackedUp:
    """Writes the folder ``results`` to a tar file, readable by its owner alone.

    No round may be on: what a round leaves in several files then fits together. Databases are
    copied by SQLite, which reads what lies beside them, too.

    Raises:
        DataError: there is no such run, or a database is damaged.
        DiskFull: there was no room; nothing half-written is left.
    """
    if not results.is_dir():
        raise DataError(f"{results}: there is no such run. Nothing was written.")
    with disk_errors(file), tempfile.TemporaryDirectory(dir=file.parent, prefix=".backup.") as made:
        partial = Path(made) / "backup.tar"
        count = 0
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as stream:
            with tarfile.open(fileobj=stream, mode="w") as tar:
                for path in _files(results):
                    name = f"{results.name}/{path.relative_to(results).as_posix()}"
                    tar.add(_still(path, Path(made)), arcname=name, recursive=False)
                    count += 1
            stream.flush()
            os.fsync(stream.fileno())
        size = partial.stat().st_size
        partial.rename(file)
        sync_folder(file.parent)
    return BackedUp(str(file), count, size, f"{now:%Y-%m-%dT%H:%M:%SZ}")


def _files(results: Path) -> Iterator[Path]:
    """What a run's folder holds."""
    for path in sorted(results.rglob("*")):
        inner = path.relative_to(results)
        hidden = any(part.startswith(".") for part in inner.parts)
        if hidden or inner.parts[0] in _LEFT_OUT or path.name.endswith(_BESIDE):
            continue
        if path.is_file() and not path.is_symlink():
            yield path


def _still(path: Path, folder: Path) -> Path:
    """The file itself, or a copy of a database that nothing changes any more."""
    if not _is_database(path):
        return path
    copy = folder / path.name
    copy.unlink(missing_ok=True)
    try:
        with (
            closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as there,
            closing(sqlite3.connect(copy)) as here,
        ):
            there.backup(here)
    except sqlite3.Error as error:
        raise DataError(
            f"{path}: this database cannot be copied ({error}). No backup was made; see that the "
            "disk is sound."
        ) from None
    return copy


def _is_database(path: Path) -> bool:
    with path.open("rb") as stream:
        return stream.read(len(_SQLITE)) == _SQLITE
