"""Where a device reads a repository from."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from fedcore.errors import DataError, TrustError

Source = Callable[[str, int], Iterator[bytes]]
"""Reads a file of a repository, named relative to it, from a byte offset on, in chunks.

Raises `FileNotFoundError` where there is none. Nothing that it yields is trusted: whoever reads
knows the length and the digest beforehand, or checks a signature after.
"""

CHUNK_BYTES = 1 << 20  # 1 MiB: at most so much is fetched again after an interruption
_UNREAD = "It was not read; the version before keeps serving."


def folder_source(repository: Path) -> Source:
    """A repository in a folder: a disk, a mounted share, a medium that was carried over.

    Raises:
        DataError: there is no repository in the folder.
    """
    if not (repository / "metadata").is_dir():
        raise DataError(
            f"{repository}: expected a release repository, with a folder `metadata`, found none. "
            "Nothing was fetched; the version before keeps serving. Check --repository."
        )
    inside = repository.resolve()

    def read(name: str, offset: int) -> Iterator[bytes]:
        with _open(inside, name, offset) as stream:
            yield from _chunks(stream)

    return read


def _open(inside: Path, name: str, offset: int) -> BinaryIO:
    try:
        path = (inside / name).resolve()
    except RuntimeError as error:  # how Python 3.11 reports links that lead round in a circle
        raise TrustError(f"{inside / name}: its symbolic links form a loop. {_UNREAD}") from error
    if not path.is_relative_to(inside):
        raise TrustError(
            f"{inside / name}: it leads out of the repository, to {path}. {_UNREAD} Whoever keeps "
            "the repository has to look into this."
        )
    try:
        # Without O_NONBLOCK a pipe laid there would hang the device.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    except PermissionError:
        raise DataError(f"{path}: this user may not read it. {_UNREAD}") from None
    except NotADirectoryError:
        raise FileNotFoundError(name) from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise TrustError(f"{path}: expected a regular file, found something else. {_UNREAD}")
    stream = os.fdopen(descriptor, "rb")
    stream.seek(offset)
    return stream


def _chunks(stream: BinaryIO) -> Iterator[bytes]:
    try:
        while chunk := stream.read(CHUNK_BYTES):
            yield chunk
    except OSError as error:
        raise DataError(
            f"{stream.name}: reading it failed ({error.strerror}). What was fetched is kept; the "
            "version before keeps serving. Run the update again."
        ) from error
