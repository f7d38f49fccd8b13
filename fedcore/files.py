"""File helpers: atomic and durable writes, bounded reads, checks of output paths, and locks."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from fedcore.errors import ConfigError, DataError, DiskFull, FedcoreError, ResourceError

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_UNFINISHED = re.compile(r"\..+\.[a-z0-9_]{8}", re.DOTALL)
"""Names that `write_atomic` gives to temporary files."""
_NO_FOLDER = (FileNotFoundError, NotADirectoryError)
_RANDOM = len(".") + 8
"""Length of what such a name has after that of the file to write."""
ABANDONED_S = 3600.0
"""No write takes so long: its temporary file was left by a process that was killed."""
PICTURES = (".png", ".pdf", ".svg")
"""File extensions of pictures; each one determines the format."""
_REFUSED = {
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST, errno.ENOTDIR, errno.EISDIR),
    *(errno.ELOOP, errno.ENXIO, errno.ENODEV, errno.ENOTEMPTY, errno.EBUSY),
    errno.ENAMETOOLONG,
}


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turns operating-system errors of any library that writes to ``path`` into fedcore's.

    Raises:
        DiskFull: the disk has no room.
        ResourceError: this user may not write there, or a folder or file is in the way.
    """
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise DiskFull(
                f"{path}: the disk has no room for this file ({error.strerror}). No partial file "
                "was left; free some space there, or choose another folder, and run again."
            ) from error
        if error.errno in _REFUSED:
            raise ResourceError(
                f"{path}: cannot write this file ({error.strerror}). Nothing was written; choose "
                "another place, or make this one writable, and run again."
            ) from error
        raise


def write_atomic(path: Path, data: bytes, *, mode: int = 0o644) -> None:
    """Writes ``data`` to ``path`` so that a reader sees either the old bytes or all new ones.

    Writes a temporary file next to ``path``, fsyncs it and renames it; fsyncs the folder, too, so
    that the name survives a power cut. Creates missing folders.

    Raises:
        DiskFull: the disk has no room; ``path`` is unchanged.
        ResourceError: the path is not writable; ``path`` is unchanged.
    """
    with disk_errors(path):
        private = not mode & 0o077  # new folders of a private file are private, too
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700 if private else 0o777)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(descriptor, "wb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
            Path(temporary).chmod(mode)
            Path(temporary).replace(path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    sync_folder(path.parent)


def remove_unfinished(folder: Path, *names: str, idle_s: float = 0.0) -> None:
    """Removes files that `write_atomic` left in a folder when its process was killed.

    Call it only while nothing else can write there, such as under the folder's lock. Leaves
    subfolders, links and all other names alone.

    Args:
        folder: The folder; nothing happens if there is none.
        names: Files that were being written; of any name if empty. Give them where the folder may
            also hold files of its user, whose hidden files may have such names.
        idle_s: Leaves files that were written within so many seconds: where a process may be
            writing without a lock.

    Raises:
        ResourceError: a file cannot be removed.
    """
    before_s = time.time() - idle_s
    with disk_errors(folder), suppress(*_NO_FOLDER), os.scandir(folder) as entries:
        for entry in entries:
            if not _UNFINISHED.fullmatch(entry.name) or not entry.is_file(follow_symlinks=False):
                continue
            written = entry.name[1:-_RANDOM]
            old = not idle_s or entry.stat(follow_symlinks=False).st_mtime <= before_s
            if old and (not names or written in names):
                Path(entry.path).unlink(missing_ok=True)


def remove_unfinished_below(folder: Path) -> None:
    """Does what `remove_unfinished` does in a folder and all below it, which are fedcore's own."""
    for path, _, _ in os.walk(folder):
        remove_unfinished(Path(path))


def check_file(path: Path, *, option: str) -> None:
    """Checks before any work that a result can be written to ``path``; creates nothing.

    `write_atomic` later replaces an existing file and creates missing folders.

    Args:
        path: The file to write.
        option: The command-line option that sets the path, for errors.

    Raises:
        ResourceError: ``path`` is a folder, or its parent is no folder or not writable.
        DiskFull: the disk has no room.
    """
    if path.is_dir():
        raise ResourceError(
            f"{option} {path}: expected a file to write, got a folder. Nothing was done; give "
            "the path of a file in it."
        )
    _check_place(path.parent, f"{option} {path}")


def check_folder(path: Path, *, option: str) -> None:
    """Checks before any work that results can be written into a folder; creates nothing.

    Later writes replace existing files and create missing folders.

    Args:
        path: The folder.
        option: The command-line option that sets the path, for errors.

    Raises:
        ResourceError: the folder, or its nearest existing parent, is no folder or not writable.
        DiskFull: the disk has no room.
    """
    _check_place(path, f"{option} {path}")


def check_picture(path: Path, *, option: str) -> None:
    """Checks before any work that a picture can be written to ``path``; creates nothing.

    Raises:
        ConfigError: its name ends in none of `PICTURES`.
        ResourceError: ``path`` is a folder, or its parent is no folder or not writable.
        DiskFull: the disk has no room.
    """
    if path.suffix.lower() not in PICTURES:
        raise ConfigError(
            f"{option} {path}: expected a file name that ends in .png, .pdf or .svg, which "
            "selects the format of the plot. Nothing was drawn; choose such a name."
        )
    check_file(path, option=option)


def _check_place(folder: Path, named: str) -> None:
    """Writes an unnamed temporary file into the nearest existing folder; leaves no trace."""
    there = folder
    while not there.exists() and there != there.parent:
        there = there.parent
    if not there.is_dir():
        raise ResourceError(
            f"{named}: {there} is a file, expected a folder. Nothing was done; choose another "
            "place, or move that file away."
        )
    try:
        with tempfile.TemporaryFile(dir=there) as stream:
            stream.write(b"\0")
    except OSError as error:
        kind = DiskFull if error.errno in _FULL else ResourceError
        raise kind(
            f"{named}: cannot write into {there} ({error.strerror}). Nothing was done; choose "
            "another place, or free some space and make it writable by this user."
        ) from None


def sync_folder(folder: Path) -> None:
    """Fsyncs a folder, which makes renames in it durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: Any, *, mode: int = 0o644) -> None:
    """Writes ``value`` as indented JSON, atomically; raises ``ValueError`` for NaN or infinity."""
    write_atomic(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode(), mode=mode)


def read_bytes(path: Path, *, max_bytes: int, what: str, otherwise: str = "") -> bytes:
    """Reads an existing file of at most ``max_bytes``.

    Args:
        path: The file.
        max_bytes: The size limit.
        what: The noun for the file in errors, such as ``"the lock"``.
        otherwise: A sentence for errors about a missing or unreadable file: consequence and remedy.

    Raises:
        DataError: the file does not exist, is no regular file, is unreadable, is too large, or
            changes during the read.
    """
    more = f" {otherwise}" if otherwise else ""
    try:
        with os.fdopen(_open_regular(path, os.O_RDONLY, what, more), "rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            if size > max_bytes:
                raise DataError(
                    f"{path}: {what} has {size} bytes, more than the {max_bytes} allowed. "
                    "It was not read."
                )
            raw = stream.read(size + 1)
    except (FileNotFoundError, NotADirectoryError):
        gone = "is a broken symbolic link" if path.is_symlink() else "does not exist"
        raise DataError(f"{path}: {what} {gone}.{more}") from None
    except PermissionError:
        raise DataError(f"{path}: this user may not read {what}.{more}") from None
    except OSError as error:
        raise DataError(f"{path}: cannot read {what} ({error.strerror}).{more}") from error
    if len(raw) != size:
        raise DataError(
            f"{path}: {what} changed while it was being read. It was not used; try again."
        )
    return raw


def read_if_exists(path: Path, *, max_bytes: int, what: str, otherwise: str = "") -> bytes | None:
    """Reads a file of at most ``max_bytes``; returns None if nothing has that name.

    Raises:
        DataError: the file cannot be read, see `read_bytes`. A broken or circular link counts as
            present.
    """
    if not name_exists(path):
        return None
    return read_bytes(path, max_bytes=max_bytes, what=what, otherwise=otherwise)


def name_exists(path: Path) -> bool:
    """Returns whether anything has that name, even a broken or circular link.

    Use it where a missing file means "nothing happened yet": `Path.exists` also returns False for
    a broken link and for a folder that may not be searched.
    """
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return True  # opening it raises the precise error
    return True


def open_regular(
    path: Path, flags: int = os.O_RDONLY, *, what: str, otherwise: str = "", mode: int = 0o600
) -> int:
    """Opens a regular file, and nothing else; never blocks.

    Someone else may have put a pipe or a device in its place: opening a pipe waits for the other
    end, and reading a device may never finish.

    Args:
        path: The file.
        flags: Flags of `os.open`.
        what: The noun for the file in errors.
        otherwise: A sentence for the error if it is no file: consequence and remedy.
        mode: Permissions of a file that is created.

    Returns:
        A descriptor, which the caller closes.

    Raises:
        DataError: the path is not a regular file.
        OSError: `os.open` fails; `disk_errors` turns that into an error of fedcore.
    """
    return _open_regular(path, flags, what, f" {otherwise}" if otherwise else "", mode)


def _open_regular(path: Path, flags: int, what: str, more: str, mode: int = 0o600) -> int:
    try:
        descriptor = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC, mode)
    except OSError as error:
        if error.errno in (errno.ENXIO, errno.EISDIR):  # a socket, a pipe without reader; a folder
            raise _no_file(path, what, more) from None
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise _no_file(path, what, more)
    return descriptor


def _no_file(path: Path, what: str, more: str) -> DataError:
    return DataError(f"{path}: cannot read {what}: it is a folder or another kind of file.{more}")


def remove(path: Path) -> None:
    """Removes a file, a pipe, a link (not its target), or a folder with its content."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sha256_hex(data: bytes) -> str:
    """Returns the SHA-256 digest of ``data``, in lower-case hexadecimal."""
    return hashlib.sha256(data).hexdigest()


@contextmanager
def lock_file(path: Path, otherwise: FedcoreError | None = None) -> Iterator[None]:
    """Holds an exclusive lock on a file, created if missing; the end of the process releases it.

    Raises:
        FedcoreError: ``otherwise``, if another process has the lock; if None, this call waits.
        DataError: the path is not a regular file.
        ResourceError: the file cannot be opened or created.
    """
    with disk_errors(path):
        held = open_regular(
            path,
            os.O_RDWR | os.O_CREAT,
            what="the lock",
            otherwise="Nothing was done; remove it (it is empty) and run again.",
            mode=0o644,
        )
    with _locked(held, otherwise):
        yield


@contextmanager
def lock_folder(folder: Path, otherwise: FedcoreError) -> Iterator[None]:
    """Holds an exclusive lock on an existing folder; the end of the process releases it.

    Raises:
        FedcoreError: ``otherwise``, if another process has the lock.
        ResourceError: the folder cannot be opened.
    """
    with disk_errors(folder):
        held = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    with _locked(held, otherwise):
        yield


@contextmanager
def _locked(descriptor: int, otherwise: FedcoreError | None) -> Iterator[None]:
    """Locks an open file and closes it at the end; waits for the lock if ``otherwise`` is None."""
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (fcntl.LOCK_NB if otherwise else 0))
        except BlockingIOError:
            assert otherwise is not None
            raise otherwise from None
        yield
    finally:
        os.close(descriptor)
