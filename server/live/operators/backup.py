"""Backup of a run's folder to one tar file, while the run continues.

The journal's database refers to values in separate files, and each commit deletes the files that
are no longer needed. A backup therefore hard-links the values first, then copies the database, and
then checks that it has linked every value to which the copy refers.

A marker file next to the journal shows that it came from a backup. A server that resumes from it
then does not replay the WAL that a killed server may have left in the same folder.
"""

from __future__ import annotations

import os
import sqlite3
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import BinaryIO

from fedcore.errors import ConfigError, DataError, ResourceError
from fedcore.files import disk_errors, open_regular, sync_folder
from fedcore.observability.foreign import foreign
from fedcore.observability.words import counted
from server.live.journal.entries import Entries
from server.live.journal.head import JOURNAL, RESTORED, write_head
from server.live.journal.journal import VALUES, values_of
from server.live.operators.protocol import BackedUp
from server.report.folder import JOURNAL_FOLDER, results_around

_LEFT_OUT = {JOURNAL_FOLDER, "incoming", "tensorboard"}
"""Folders not copied as files: the journal, copied separately, unfinished uploads, and charts,
which can be drawn again."""
_ATTEMPTS = 20
"""Attempts to link all values. Each keeps the earlier links, so few are needed even if commits are
fast."""


def check_place(file: Path) -> None:
    """Checks that a backup may be written to ``file``.

    Raises:
        ConfigError: the path is not absolute, the file exists, its folder does not, or it is inside
            the results of a run, which the next start of that run would delete.
    """
    if not file.is_absolute() or "\0" in str(file) or file.exists():
        raise ConfigError(
            f"{str(file)!r}: expected the absolute path of a file that does not exist. Nothing "
            "was written; choose another name."
        )
    if not file.parent.is_dir():
        raise ConfigError(
            f"{file}: there is no folder {file.parent}. Nothing was written; create it, or "
            "choose another place."
        )
    around = results_around(file)
    if around is not None:
        raise ConfigError(
            f"{file}: {around} contains the results of a run, and the next start of that run "
            "would remove the backup with them. Nothing was written; choose a place outside it."
        )


def check_wanted(name: str, *, disconnected: bool, ends: bool) -> None:
    """Aborts a backup that is no longer wanted.

    Args:
        name: The run's name, for the error message.
        disconnected: Whether the client has disconnected.
        ends: Whether the run is ending.

    Raises:
        ResourceError: ``disconnected`` or ``ends`` is set.
    """
    if disconnected:
        raise ResourceError(
            "backup: the operator disconnected before it was complete. No file was left."
        )
    if ends:
        raise ResourceError(
            f"backup: the run {name!r} is ending. Nothing was written; copy its folder once "
            "`fedcore server status` finds no server."
        )


def back_up(
    results: Path, file: Path, *, now: datetime, wanted: Callable[[], None] = lambda: None
) -> BackedUp:
    """Writes the folder ``results`` to a tar file that only its owner can read.

    Args:
        results: The run's folder.
        file: Path of the tar file.
        now: Time of the backup (UTC), which is recorded in it.
        wanted: Called repeatedly while files are copied; an exception from it aborts the backup and
            leaves no partial file.

    Guarantee:
        The journal in the file is a consistent snapshot with all values to which it refers, even if
        rounds are committed meanwhile.

    Raises:
        DataError: there is no such run, or its journal is damaged.
        DiskFull: the disk is full. No partial file is left.
        ResourceError: the journal changed too quickly to be copied.
    """
    with (
        disk_errors(file),
        tempfile.TemporaryDirectory(dir=file.parent, prefix=".backup.") as made,
        snapshot(results) as held,
    ):
        partial, count = Path(made) / "backup.tar", 0
        mark = held / RESTORED
        mark.write_text(f"{now:%Y-%m-%dT%H:%M:%SZ}\n")
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as stream:
            with tarfile.open(fileobj=stream, mode="w") as tar:
                name = f"{results.name}/{JOURNAL_FOLDER}/{RESTORED}"
                count += _add(tar, mark, name, wanted)  # first: a partial restore has it, too
                mark.unlink()
                for name, path in (*_files(held, JOURNAL_FOLDER), *_files(results, "")):
                    count += _add(tar, path, f"{results.name}/{name}", wanted)
            stream.flush()
            os.fsync(stream.fileno())
        size = partial.stat().st_size
        partial.rename(file)
        sync_folder(file.parent)
    return BackedUp(str(file), count, size, f"{now:%Y-%m-%dT%H:%M:%SZ}")


@contextmanager
def snapshot(results: Path) -> Iterator[Path]:
    """Yields a folder with a consistent copy of a run's journal, also while a server uses it.

    Raises:
        DataError: there is no such run, or its journal is damaged.
        DiskFull: the disk is full.
        ResourceError: the journal changed too quickly to be copied.
    """
    if not (results / JOURNAL_FOLDER / JOURNAL).is_file():
        raise DataError(f"{results}: there is no such run. Nothing was written.")
    # In the same folder, as hard links work only within one file system.
    with (
        disk_errors(results),
        tempfile.TemporaryDirectory(dir=results, prefix=".backup.") as held,
    ):
        _hold(results / JOURNAL_FOLDER, Path(held))
        yield Path(held)


def _hold(journal: Path, held: Path) -> None:
    """Puts a consistent snapshot of the journal into ``held``, with exactly the values it needs."""
    values = held / VALUES
    values.mkdir(mode=0o700)
    before: set[str] | None = None
    for _ in range(_ATTEMPTS):
        _link(journal / VALUES, values)
        _copy(journal / JOURNAL, held / JOURNAL)
        _link(journal / VALUES, values)  # values written since the first call
        with closing(Entries(held / JOURNAL)) as entries:
            needed = values_of(entries)
            if needed <= {path.name for path in values.iterdir()}:
                write_head(held, entries)  # the original may be of a later commit
                break
        if needed == before:  # a commit that deletes values changes what is needed, too
            lost = sorted(needed - {path.name for path in values.iterdir()})
            raise DataError(
                f"{journal}: {counted(len(lost), 'value')} missing, such as "
                f"{foreign(lost[0], 80)!r}: files of this journal were deleted. Nothing was "
                "written; restore the folder from a backup."
            )
        before = needed
    else:
        raise ResourceError(
            f"{journal}: it changed {_ATTEMPTS} times while it was being copied. No backup was "
            "written; pause the run (`fedcore server pause`), and try again."
        )
    for path in values.iterdir():
        if path.name not in needed:
            path.unlink()


def _link(values: Path, held: Path) -> None:
    for path in values.iterdir():
        if not path.suffix:  # a file that is being written has a suffix
            with suppress(FileExistsError, FileNotFoundError):  # already linked, or just deleted
                (held / path.name).hardlink_to(path)


def _copy(database: Path, copy: Path) -> None:
    """Copies a database with SQLite's backup: a consistent snapshot that includes the WAL."""
    copy.unlink(missing_ok=True)
    try:
        with (
            closing(sqlite3.connect(f"{database.absolute().as_uri()}?mode=ro", uri=True)) as there,
            closing(sqlite3.connect(copy)) as here,
        ):
            there.backup(here)
    except (sqlite3.Error, UnicodeDecodeError) as error:  # a message may quote invalid UTF-8
        raise DataError(
            f"{database}: cannot copy this database ({error}). No backup was written; check the "
            "disk for errors."
        ) from None


def _files(folder: Path, name: str) -> Iterator[tuple[str, Path]]:
    """Yields each path in a folder to back up, after its path in the backup, below ``name``."""
    for path in sorted(folder.rglob("*")):
        inner = path.relative_to(folder)
        hidden = any(part.startswith(".") for part in inner.parts)
        if not hidden and inner.parts[0] not in _LEFT_OUT:
            yield str(Path(name) / inner), path


@dataclass(frozen=True)
class _Wanted:
    """A readable file that calls ``wanted`` before each read, so that it can abort the backup."""

    stream: BinaryIO
    wanted: Callable[[], None]

    def read(self, size_bytes: int = -1) -> bytes:
        self.wanted()
        return self.stream.read(size_bytes)


def _add(tar: tarfile.TarFile, path: Path, name: str, wanted: Callable[[], None]) -> bool:
    """Adds a file to the tar; returns False if it is a folder or no longer exists."""
    if path.is_dir():
        return False
    try:
        # Open first: the name may be given to another file meanwhile.
        with os.fdopen(open_regular(path, what="a file to back up"), "rb") as stream:
            info = tar.gettarinfo(arcname=name, fileobj=stream)
            tar.addfile(info, _Wanted(stream, wanted))
    except FileNotFoundError:
        return False
    return True
