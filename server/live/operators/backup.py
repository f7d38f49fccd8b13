"""A run's folder in one file, taken while the run goes on.

The journal refers to values that lie in files of their own, and each commit removes those that it
needs no more. So they are held by links first, then the journal is copied, and then it is looked
whether all that the copy refers to is held.

A mark beside the journal says that it came from a backup: whoever goes on with it then replays
nothing over it that a server which was killed left in the same folder.
"""

from __future__ import annotations

import os
import sqlite3
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import BinaryIO

from fedcore.errors import ConfigError, DataError, ResourceError
from fedcore.files import disk_errors, open_regular, sync_folder
from server.live.journal.entries import Entries
from server.live.journal.head import JOURNAL, RESTORED, write_head
from server.live.journal.journal import VALUES, values_of
from server.report.folder import JOURNAL_FOLDER, results_around

_LEFT_OUT = {JOURNAL_FOLDER, "incoming", "tensorboard"}
"""What is copied otherwise, payloads on their way, and what can be drawn again."""
_ATTEMPTS = 20
"""Each holds what those before it have held, too, so few are needed however quick commits are."""


@dataclass(frozen=True)
class BackedUp:
    """What a backup holds."""

    file: str
    files: int
    bytes: int
    created: str


def check_place(file: Path) -> None:
    """Sees that a backup may be written to ``file``.

    Raises:
        ConfigError: it is no whole path, it exists, or its folder does not; or a run would remove
            it with its results.
    """
    if not file.is_absolute() or "\0" in str(file) or file.exists():
        raise ConfigError(
            f"{str(file)!r}: expected the whole path of a file that does not exist. Nothing was "
            "written; choose another name."
        )
    if not file.parent.is_dir():
        raise ConfigError(
            f"{file}: there is no folder {file.parent}. Nothing was written; make it, or name "
            "another place."
        )
    around = results_around(file)
    if around is not None:
        raise ConfigError(
            f"{file}: {around} holds the results of a run, and the next start of that run would "
            "remove the backup with them. Nothing was written; name a place outside of it."
        )


def check_wanted(name: str, *, gone: bool, ends: bool) -> None:
    """Refuses to go on with a backup of the run ``name``.

    Args:
        name: The run's.
        gone: Whether whoever asked hung up.
        ends: Whether the run does.

    Raises:
        ResourceError: either of them.
    """
    if gone:
        raise ResourceError("backup: whoever asked hung up before it was over. Nothing was left.")
    if ends:
        raise ResourceError(
            f"backup: the run {name!r} ends. Nothing was written; copy its folder once `fedcore "
            "server status` finds no server."
        )


def back_up(
    results: Path, file: Path, *, now: datetime, wanted: Callable[[], None] = lambda: None
) -> BackedUp:
    """Writes the folder ``results`` to a tar file, readable by its owner alone.

    Args:
        results: The run's.
        file: Where it goes.
        now: UTC; what the backup says of its age.
        wanted: Called again and again while files are copied; what it raises ends that, and
            nothing is left of it.

    Guarantee:
        Whatever is committed meanwhile, the journal in the file is that of one moment, and every
        value that it refers to is there.

    Raises:
        DataError: there is no such run, or its journal is damaged.
        DiskFull: there was no room; nothing half-written is left.
        ResourceError: the journal changed too quickly to be copied.
    """
    if not (results / JOURNAL_FOLDER / JOURNAL).is_file():
        raise DataError(f"{results}: there is no such run. Nothing was written.")
    with (
        disk_errors(file),
        tempfile.TemporaryDirectory(dir=file.parent, prefix=".backup.") as made,
        tempfile.TemporaryDirectory(
            dir=results, prefix=".backup."
        ) as held,  # links reach no further
    ):
        partial, count = Path(made) / "backup.tar", 0
        _hold(results / JOURNAL_FOLDER, Path(held))
        mark = Path(held) / RESTORED
        mark.write_text(f"{now:%Y-%m-%dT%H:%M:%SZ}\n")
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as stream:
            with tarfile.open(fileobj=stream, mode="w") as tar:
                name = f"{results.name}/{JOURNAL_FOLDER}/{RESTORED}"
                count += _add(tar, mark, name, wanted)  # before the rest
                mark.unlink()
                for name, path in (*_files(Path(held), JOURNAL_FOLDER), *_files(results, "")):
                    count += _add(tar, path, f"{results.name}/{name}", wanted)
            stream.flush()
            os.fsync(stream.fileno())
        size = partial.stat().st_size
        partial.rename(file)
        sync_folder(file.parent)
    return BackedUp(str(file), count, size, f"{now:%Y-%m-%dT%H:%M:%SZ}")


def _hold(journal: Path, held: Path) -> None:
    """Puts a journal of one moment into ``held``, with what it refers to and nothing else."""
    values = held / VALUES
    values.mkdir(mode=0o700)
    for _ in range(_ATTEMPTS):
        _link(journal / VALUES, values)
        _copy(journal / JOURNAL, held / JOURNAL)
        _link(journal / VALUES, values)  # what came in between
        with closing(Entries(held / JOURNAL)) as entries:
            needed = values_of(entries)
            if needed <= {path.name for path in values.iterdir()}:
                write_head(held, entries)  # the copy beside the journal may be of another moment
                break
    else:
        raise ResourceError(
            f"{journal}: it changed {_ATTEMPTS} times while it was copied. No backup was made; "
            "pause the run (`fedcore server pause`), and try again."
        )
    for path in values.iterdir():
        if path.name not in needed:
            path.unlink()


def _link(values: Path, held: Path) -> None:
    for path in values.iterdir():
        if not path.suffix:  # one that is being written has one
            with suppress(FileExistsError, FileNotFoundError):  # held by now, or swept by now
                (held / path.name).hardlink_to(path)


def _copy(database: Path, copy: Path) -> None:
    """As SQLite copies: what lies beside a database is read, too, and it is of one moment."""
    copy.unlink(missing_ok=True)
    try:
        with (
            closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as there,
            closing(sqlite3.connect(copy)) as here,
        ):
            there.backup(here)
    except (sqlite3.Error, UnicodeDecodeError) as error:  # what it says may quote what is no text
        raise DataError(
            f"{database}: this database cannot be copied ({error}). No backup was made; see that "
            "the disk is sound."
        ) from None


def _files(folder: Path, name: str) -> Iterator[tuple[str, Path]]:
    """What a folder holds, by the names that it gets below ``name``."""
    for path in sorted(folder.rglob("*")):
        inner = path.relative_to(folder)
        hidden = any(part.startswith(".") for part in inner.parts)
        if not hidden and inner.parts[0] not in _LEFT_OUT:
            yield str(Path(name) / inner), path


@dataclass(frozen=True)
class _Wanted:
    """A file that is read for as long as somebody wants it."""

    stream: BinaryIO
    wanted: Callable[[], None]

    def read(self, size_bytes: int = -1) -> bytes:
        self.wanted()
        return self.stream.read(size_bytes)


def _add(tar: tarfile.TarFile, path: Path, name: str, wanted: Callable[[], None]) -> bool:
    """Adds a file as it is now; says whether it is still there."""
    if path.is_dir():
        return False
    try:
        # Opened first: its name may be given to another meanwhile.
        with os.fdopen(open_regular(path, what="a file to back up"), "rb") as stream:
            info = tar.gettarinfo(arcname=name, fileobj=stream)
            tar.addfile(info, _Wanted(stream, wanted))
    except FileNotFoundError:
        return False
    return True
