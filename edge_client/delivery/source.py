"""Byte sources for a release repository."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from fedcore.errors import DataError, TrustError

Source = Callable[[str, int], Iterator[bytes]]
"""Function ``(name, offset)`` that yields a repository file in chunks, from a byte offset on.

``name`` is relative to the repository. Raises `FileNotFoundError` if no such file exists. The bytes
are untrusted: the caller checks them against a known length and digest, or verifies a signature.
"""

CHUNK_BYTES = 1 << 20  # 1 MiB: an interruption loses at most this much
_UNREAD = "It was not read; the previous version keeps serving."


def folder_source(repository: Path) -> Source:
    """Returns a source for a repository in a folder: a local disk, a share or removable media.

    The source reads regular files only, and refuses symbolic links that lead out of the folder.

    Raises:
        DataError: the folder contains no repository.
    """
    if not (repository / "metadata").is_dir():
        raise DataError(
            f"{repository}: expected a release repository, with a folder `metadata`, found none. "
            "Nothing was fetched; the previous version keeps serving. Check --repository."
        )
    inside = repository.resolve()

    def read(name: str, offset: int) -> Iterator[bytes]:
        with _open(inside, name, offset) as stream:
            yield from _chunks(stream)

    return read


def _open(inside: Path, name: str, offset: int) -> BinaryIO:
    try:
        path = (inside / name).resolve()
    except RuntimeError as error:  # how Python 3.11 reports a loop of links
        raise TrustError(f"{inside / name}: its symbolic links form a loop. {_UNREAD}") from error
    if not path.is_relative_to(inside):
        raise TrustError(
            f"{inside / name}: it points outside the repository, to {path}. {_UNREAD} The "
            "repository's maintainer must investigate this."
        )
    try:
        # Without O_NONBLOCK, opening a planted pipe would hang.
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
            f"{stream.name}: cannot read it ({error.strerror}). The part already fetched is "
            "kept; the previous version keeps serving. Run the update again."
        ) from error
