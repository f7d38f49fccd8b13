"""Writing files whole or not at all, and reading them with limits."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fedcore.errors import ConfigError, DataError, DiskFull, FedcoreError, ResourceError

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
PICTURES = (".png", ".pdf", ".svg")
"""How the name of a picture ends: its format follows from it."""
_REFUSED = {
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST, errno.ENOTDIR, errno.EISDIR),
    *(errno.ELOOP, errno.ENXIO, errno.ENODEV, errno.ENOTEMPTY, errno.EBUSY),
    errno.ENAMETOOLONG,
}


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turns a full disk into `DiskFull`, whatever library was writing to ``path``.

    Raises:
        DiskFull: there was no room.
        ResourceError: this user may not write there, or a folder or file is in the way.
    """
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise DiskFull(
                f"{path}: the disk has no room for this file ({error.strerror}). "
                "Nothing half-written was left; free space there, or choose another folder, "
                "and run again."
            ) from error
        if error.errno in _REFUSED:
            raise ResourceError(
                f"{path}: this file cannot be written ({error.strerror}). Nothing was; choose "
                "another place, or make this one writable, and run again."
            ) from error
        raise


def write_atomic(path: Path, data: bytes, *, mode: int = 0o644) -> None:
    """Writes ``data`` to ``path`` so that a reader sees the old bytes or all of the new ones.

    The bytes go to a temporary file beside ``path``, are fsynced, and take its name; the folder
    is fsynced too, so that the name survives a power cut.

    Raises:
        DiskFull: there was no room; ``path`` is as it was.
        ResourceError: it may not be written there; ``path`` is as it was.
    """
    with disk_errors(path):
        private = not mode & 0o077  # a folder that is made for such a file is so, too
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


def check_file(path: Path, *, option: str) -> None:
    """Sees, before any work, that a result can be written to ``path``; nothing is made.

    A file that is there is replaced then, and folders that are missing are made.

    Args:
        path: Where `write_atomic` is to write it.
        option: Of the command line that names it, for errors.

    Raises:
        ResourceError: a folder has its name, or what should be its folder is none or may not be
            written to.
        DiskFull: there is no room.
    """
    if path.is_dir():
        raise ResourceError(
            f"{option} {path}: a folder has this name, and a file is to be written. Nothing was "
            "done; name a file in it."
        )
    _check_place(path.parent, f"{option} {path}")


def check_folder(path: Path, *, option: str) -> None:
    """Sees, before any work, that results can be written into a folder; nothing is made.

    Files that are there are replaced then, and folders that are missing are made.

    Args:
        path: The folder.
        option: Of the command line that names it, for errors.

    Raises:
        ResourceError: it, or what should be a folder above it, is none or may not be written to.
        DiskFull: there is no room.
    """
    _check_place(path, f"{option} {path}")


def check_picture(path: Path, *, option: str) -> None:
    """As `check_file`, for a picture.

    Raises:
        ConfigError: its name ends in none of `PICTURES`.
        ResourceError: as `check_file` says.
        DiskFull: there is no room.
    """
    if path.suffix.lower() not in PICTURES:
        raise ConfigError(
            f"{option} {path}: the name of a picture ends in .png, .pdf or .svg, and its format "
            "follows from that. Nothing was drawn; name it so."
        )
    check_file(path, option=option)


def _check_place(folder: Path, named: str) -> None:
    """Writes a file without a name in the nearest folder that is there; it leaves no trace."""
    there = folder
    while not there.exists() and there != there.parent:
        there = there.parent
    if not there.is_dir():
        raise ResourceError(
            f"{named}: {there} is a file, and a folder is needed there. Nothing was done; name "
            "another place, or move that file away."
        )
    try:
        with tempfile.TemporaryFile(dir=there) as stream:
            stream.write(b"\0")
    except OSError as error:
        kind = DiskFull if error.errno in _FULL else ResourceError
        raise kind(
            f"{named}: nothing can be written into {there} ({error.strerror}). Nothing was done; "
            "name another place, or make room and have it writable by this user."
        ) from None


def sync_folder(folder: Path) -> None:
    """Makes renames inside ``folder`` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: Any, *, mode: int = 0o644) -> None:
    """Writes ``value`` as indented JSON, atomically; NaN is refused rather than written."""
    write_atomic(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode(), mode=mode)


def read_bytes(path: Path, *, max_bytes: int, what: str, otherwise: str = "") -> bytes:
    """Reads a file that must exist and hold at most ``max_bytes``.

    Args:
        path: The file.
        max_bytes: Its limit.
        what: It is, for errors.
        otherwise: What follows where it is not there or no file, and what to do then; a sentence.

    Raises:
        DataError: it does not exist, is no regular file, is larger, or changes meanwhile.
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
        gone = "leads nowhere: it is a link" if path.is_symlink() else "does not exist"
        raise DataError(f"{path}: {what} {gone}.{more}") from None
    except PermissionError:
        raise DataError(f"{path}: {what} may not be read by this user.{more}") from None
    except OSError as error:
        raise DataError(f"{path}: {what} cannot be read ({error.strerror}).{more}") from error
    if len(raw) != size:
        raise DataError(f"{path}: {what} changed while it was read. It was not used; try again.")
    return raw


def read_if_there(path: Path, *, max_bytes: int, what: str, otherwise: str = "") -> bytes | None:
    """As `read_bytes`, but None where nothing at all has that name (see `is_there`).

    Raises:
        DataError: as `read_bytes`; a link that leads nowhere or round in a circle is no absence.
    """
    if not is_there(path):
        return None
    return read_bytes(path, max_bytes=max_bytes, what=what, otherwise=otherwise)


def is_there(path: Path) -> bool:
    """Whether anything has that name, be it a link that leads nowhere or round in a circle.

    Where the absence of a file means "nothing happened yet", this is to be asked: `Path.exists`
    takes a broken link, and a folder that may not be searched, for an absence.
    """
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return True  # opening it says why that cannot be done
    return True


def open_regular(
    path: Path, flags: int = os.O_RDONLY, *, what: str, otherwise: str = "", mode: int = 0o600
) -> int:
    """Opens a file whose place somebody else may have put something else into; never waits.

    Opening a pipe waits for its other end, and reading a device may never end. So nothing is
    opened for good but a regular file.

    Args:
        path: The file.
        flags: Of `os.open`.
        what: It is, for errors.
        otherwise: What follows where it is no file, and what to do then; a sentence.
        mode: Of a file that is made.

    Returns:
        A descriptor, which the caller closes.

    Raises:
        DataError: something else than a file has its name.
        OSError: as `os.open`; `disk_errors` makes errors of ours of those.
    """
    return _open_regular(path, flags, what, f" {otherwise}" if otherwise else "", mode)


def _open_regular(path: Path, flags: int, what: str, more: str, mode: int = 0o600) -> int:
    try:
        descriptor = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC, mode)
    except OSError as error:
        if error.errno in (errno.ENXIO, errno.EISDIR):  # a socket, a pipe nobody reads; a folder
            raise _no_file(path, what, more) from None
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise _no_file(path, what, more)
    return descriptor


def _no_file(path: Path, what: str, more: str) -> DataError:
    return DataError(
        f"{path}: {what} cannot be read: a folder or something else has its name.{more}"
    )


def remove(path: Path) -> None:
    """Removes whatever has that name: a file, a pipe, a link itself, or a folder with all in it."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sha256_hex(data: bytes) -> str:
    """The SHA-256 digest of ``data``, in lower-case hexadecimal."""
    return hashlib.sha256(data).hexdigest()


@contextmanager
def lock_file(path: Path, otherwise: FedcoreError | None = None) -> Iterator[None]:
    """Holds a lock file, which is made where it is missing; whatever ends the process lets go.

    Raises:
        FedcoreError: ``otherwise``, where another process holds it; when None, it is waited for.
        DataError: something else than a file has its name.
        ResourceError: it cannot be opened or made.
    """
    with disk_errors(path):
        held = open_regular(
            path,
            os.O_RDWR | os.O_CREAT,
            what="the lock",
            otherwise="Nothing was done; remove it, it holds nothing, and run again.",
            mode=0o644,
        )
    try:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | (fcntl.LOCK_NB if otherwise else 0))
        except BlockingIOError:
            assert otherwise is not None
            raise otherwise from None
        yield
    finally:
        os.close(held)


@contextmanager
def held_alone(folder: Path, otherwise: FedcoreError) -> Iterator[None]:
    """Holds a folder that exists for this process alone; whatever ends the process lets go of it.

    Raises:
        FedcoreError: ``otherwise``, where another process holds it.
        ResourceError: the folder cannot be opened.
    """
    with disk_errors(folder):
        held = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise otherwise from None
        yield
    finally:
        os.close(held)
