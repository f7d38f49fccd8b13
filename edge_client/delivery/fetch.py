"""Fetch of a release's files: resumable, bounded in size and checked against a signed digest."""

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

PART = ".part"
"""Suffix of unfinished files."""
_APPEND = os.O_WRONLY | os.O_APPEND | os.O_CREAT


def unfinished_name(entry: FileEntry) -> str:
    """Returns the name of a file while it is fetched."""
    return f"{entry.sha256}{PART}"


def fetch(source: Source, location: str, entry: FileEntry, incoming: Path) -> Path:
    """Fetches one file into ``incoming``, and resumes an interrupted fetch.

    Guarantee:
        The file returned has the entry's length and SHA-256. At most the entry's length plus one
        chunk is read, and at most the length is written.

    Args:
        source: The repository.
        location: Path of the bytes in the repository.
        entry: The signed length and digest.
        incoming: Folder for unfinished files, named by digest; created if missing.

    Raises:
        DigestMismatch: the bytes differ from what was signed, and are discarded; or the repository
            has only the first part of them, which is kept for a later fetch.
        DataError: the file is missing from the repository.
        DiskFull: there was no room; the unfinished file is removed.
    """
    incoming.mkdir(parents=True, exist_ok=True)
    partial = incoming / unfinished_name(entry)
    resumed = os.path.lexists(partial)
    if resumed and not stat.S_ISREG(os.lstat(partial).st_mode):
        remove(partial)  # a pipe, folder or link: not from a fetch
    try:
        _append(source, location, entry, partial)
    except DigestMismatch:
        if not resumed:
            raise
        _append(source, location, entry, partial)  # only the old part may have been wrong
    return partial


def _append(source: Source, location: str, entry: FileEntry, partial: Path) -> None:
    """Appends the missing bytes to ``partial``, and checks length and digest."""
    digest, length = _partial_state(partial, entry.length)
    with disk_errors(partial):
        try:
            with os.fdopen(_opened(partial, _APPEND), "ab") as stream:
                for chunk in _remaining_chunks(source, location, length, entry.length):
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
    if length < entry.length:  # kept: a later fetch resumes here
        raise DigestMismatch(
            f"{entry.path}: expected {entry.length} bytes, got only the first {length}. The "
            "previous version keeps serving; run the update again when the repository is "
            "complete."
        )
    if length > entry.length or digest.hexdigest() != entry.sha256:
        partial.unlink()
        got = f"sha256 {digest.hexdigest()}" if length == entry.length else "more bytes"
        raise DigestMismatch(
            f"{entry.path}: expected {entry.length} bytes, sha256 {entry.sha256}, got {got}. It "
            "was discarded; the previous version keeps serving. The repository is damaged or was "
            "tampered with; restore it, then run again."
        )


def _partial_state(partial: Path, max_bytes: int) -> tuple[hashlib._Hash, int]:
    """Returns the running digest and the length of an unfinished file; empty if it is too long."""
    digest = hashlib.sha256()
    if not partial.exists():
        return digest, 0
    if partial.stat().st_size > max_bytes:
        partial.unlink()
        return digest, 0
    with os.fdopen(_opened(partial, os.O_RDONLY), "rb") as stream:
        while chunk := stream.read(CHUNK_BYTES):
            digest.update(chunk)
        return digest, stream.tell()


def _opened(partial: Path, flags: int) -> int:
    return open_regular(partial, flags, what="an unfinished fetch", mode=0o644)


def _remaining_chunks(source: Source, location: str, offset: int, length: int) -> Iterator[bytes]:
    if offset == length:
        return
    try:
        yield from source(location, offset)
    except FileNotFoundError:
        raise DataError(
            f"{location}: the repository lacks this file, which its signed metadata lists. The "
            "previous version keeps serving; run the update again when the repository is "
            "complete."
        ) from None
