"""Fetching the bytes of a release: bounded, resumable, believed only when their digest fits."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from edge_client.delivery.source import CHUNK_BYTES, Source
from fedcore.artifacts.manifest import FileEntry
from fedcore.errors import DataError, DigestMismatch
from fedcore.files import disk_errors, open_regular, remove

_APPEND = os.O_WRONLY | os.O_APPEND | os.O_CREAT


def fetch(source: Source, location: str, entry: FileEntry, incoming: Path) -> Path:
    """Fetches one file into ``incoming``, going on where an interrupted fetch stopped.

    Guarantee:
        The file returned has the entry's length and SHA-256. Never more than the entry's length,
        plus one chunk, is read, and never more than its length is written.

    Args:
        source: The repository.
        location: Where in it the bytes are.
        entry: The length and digest that were signed.
        incoming: A folder for unfinished files, named by digest.

    Raises:
        DigestMismatch: the bytes differ from what was signed; they are gone again.
        DataError: the repository lacks the file.
        DiskFull: there was no room; nothing is left.
    """
    incoming.mkdir(parents=True, exist_ok=True)
    partial = incoming / f"{entry.sha256}.part"
    resumed = os.path.lexists(partial)
    if resumed and not stat.S_ISREG(os.lstat(partial).st_mode):
        remove(partial)  # no fetch of ours left a pipe, a folder or a link there
    try:
        _append(source, location, entry, partial)
    except DigestMismatch:
        if not resumed:
            raise
        _append(source, location, entry, partial)  # what lay here was wrong; the source may not be
    return partial


def _append(source: Source, location: str, entry: FileEntry, partial: Path) -> None:
    """Brings ``partial`` to its full length and compares its digest."""
    digest, length = _begun(partial, entry.length)
    with disk_errors(partial):
        try:
            with os.fdopen(_opened(partial, _APPEND), "ab") as stream:
                for chunk in _rest(source, location, length, entry.length):
                    length += len(chunk)
                    if length > entry.length:
                        break
                    stream.write(chunk)
                    digest.update(chunk)
                stream.flush()
                os.fsync(stream.fileno())
        except OSError:
            partial.unlink(missing_ok=True)
            raise
    if length < entry.length:  # kept: the rest may come later
        raise DigestMismatch(
            f"{entry.path}: expected {entry.length} bytes, the repository has the first {length}. "
            "The version before keeps serving; run the update again when the repository is whole."
        )
    if length > entry.length or digest.hexdigest() != entry.sha256:
        partial.unlink()
        got = f"sha256 {digest.hexdigest()}" if length == entry.length else "more bytes"
        raise DigestMismatch(
            f"{entry.path}: expected {entry.length} bytes, sha256 {entry.sha256}, got {got}. It "
            "was discarded; the version before keeps serving. The repository is damaged or was "
            "tampered with; restore it, then run again."
        )


def _begun(partial: Path, most_bytes: int) -> tuple[hashlib._Hash, int]:
    """The running digest and the length of what an interrupted fetch left."""
    digest = hashlib.sha256()
    if not partial.exists():
        return digest, 0
    if partial.stat().st_size > most_bytes:
        partial.unlink()
        return digest, 0
    with os.fdopen(_opened(partial, os.O_RDONLY), "rb") as stream:
        while chunk := stream.read(CHUNK_BYTES):
            digest.update(chunk)
        return digest, stream.tell()


def _opened(partial: Path, flags: int) -> int:
    return open_regular(partial, flags, what="an unfinished fetch", mode=0o644)


def _rest(source: Source, location: str, offset: int, length: int) -> Iterator[bytes]:
    if offset == length:
        return
    try:
        yield from source(location, offset)
    except FileNotFoundError:
        raise DataError(
            f"{location}: the repository lacks this file, which its signed metadata names. The "
            "version before keeps serving; run the update again when the repository is whole."
        ) from None
