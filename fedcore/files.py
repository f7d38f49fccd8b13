"""Writing files whole or not at all, and reading them with limits."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fedcore.errors import DataError, DiskFull

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turns a full disk into `DiskFull`, whatever library was writing to ``path``."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise DiskFull(
                f"{path}: the disk has no room for this file ({error.strerror}). "
                "Nothing half-written was left; free space there, or choose another folder, "
                "and run again."
            ) from error
        raise


def write_atomic(path: Path, data: bytes, *, mode: int = 0o644) -> None:
    """Writes ``data`` to ``path`` so that a reader sees the old bytes or all of the new ones.

    The bytes go to a temporary file beside ``path``, are fsynced, and take its name; the folder
    is fsynced too, so that the name survives a power cut.

    Raises:
        DiskFull: there was no room; ``path`` is as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with disk_errors(path):
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


def read_bytes(path: Path, *, max_bytes: int, what: str) -> bytes:
    """Reads a file that must exist and hold at most ``max_bytes``.

    Raises:
        DataError: it does not exist, is no regular file, or is larger.
    """
    try:
        size = path.stat().st_size
        if not path.is_file():
            raise DataError(f"{path}: expected {what}, found something that is no file.")
        if size > max_bytes:
            raise DataError(
                f"{path}: {what} has {size} bytes, more than the {max_bytes} allowed. "
                "It was not read."
            )
        return path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"{path}: {what} does not exist.") from None
    except PermissionError:
        raise DataError(f"{path}: {what} may not be read by this user.") from None


def sha256_hex(data: bytes) -> str:
    """The SHA-256 digest of ``data``, in lower-case hexadecimal."""
    return hashlib.sha256(data).hexdigest()
