"""Content-addressed store for large values: one file each in one folder, named by its digest."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path

from fedcore.errors import DataError
from fedcore.files import disk_errors, open_regular, read_bytes, sync_folder
from fedcore.updates.piece_digests import cut_digests, digest_of_cuts
from fedcore.updates.pieces import PIECE_BYTES

_NEW = ".new"
_NO_LINKS = {errno.EXDEV, errno.EPERM, errno.ENOTSUP, errno.EMLINK}
_CUTS = "cuts-"
"""Prefix of a file name that is the digest over the digests of the value's cuts (chunks)."""
Pieces = Callable[[], Iterable[bytes | memoryview]]
"""Returns an iterator over a value's bytes, in order; may be called more than once."""


class Blobs:
    """Durable store of values by digest; equal values share a file.

    A value written with `put` is named by its SHA-256. A file added with `adopt` is named by the
    digest over the digests of its cuts, which were computed as it arrived.
    """

    def __init__(self, folder: Path) -> None:
        """Creates ``folder`` if it does not exist, and stores all values in it."""
        self._folder = folder
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)

    def put(self, value: Pieces) -> str:
        """Writes a value durably (it survives a power cut) and returns its digest.

        Keeps only one piece in memory at a time, unless the caller has the whole value in memory.

        Raises:
            DiskFull: the disk is full. No partial file is left.
        """
        found = hashlib.sha256()
        for piece in value():
            found.update(piece)
        digest = found.hexdigest()
        path = self._folder / digest
        if path.is_file() and _digest_of(path) == digest:
            return digest
        temporary = path.with_suffix(_NEW)
        with disk_errors(path):
            try:
                with temporary.open("wb", buffering=0) as stream:
                    for piece in value():
                        left = memoryview(piece)
                        while left:  # a disk that fills up accepts part of a write first
                            left = left[stream.write(left) :]
                    os.fsync(stream.fileno())
                temporary.replace(path)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
        sync_folder(self._folder)
        return digest

    def adopt(self, path: Path, cuts: Sequence[str], size_bytes: int) -> str:
        """Adds the file at ``path`` as a value, durably, and returns the value's name.

        Hard-links the file; copies it only if the file system has no hard links or ``path`` is on
        another file system. Afterwards ``path`` may be deleted, but the file must not be modified.

        Args:
            path: The file.
            cuts: Digests of its cuts, which the caller has verified against its bytes.
            size_bytes: Size of the file.

        Raises:
            DiskFull: the disk is full. No partial file is left.
        """
        name = _CUTS + digest_of_cuts(cuts, size_bytes)
        own = self._folder / name
        with disk_errors(own):
            if not _linked(path, own):
                _replace(path, own)
        sync_folder(self._folder)
        return name

    def get(self, digest: str, size: int) -> bytes:
        """Returns the value of ``size`` bytes named ``digest``, a SHA-256.

        Raises:
            DataError: the file is missing, or its bytes do not match ``digest``.
        """
        path = self._folder / digest
        raw = read_bytes(path, max_bytes=size, what="a value of the journal")
        if hashlib.sha256(raw).hexdigest() != digest:
            raise _damaged(path)
        return raw

    def path(self, digest: str) -> Path:
        """Returns the file of the value named ``digest``, unverified: for this process's writes."""
        return self._folder / digest

    def checked(self, digest: str) -> Path:
        """Returns the file of the value named ``digest``, after verifying its bytes.

        Raises:
            DataError: the file is missing, or its bytes do not match ``digest``.
        """
        path = self._folder / digest
        try:
            found = _cuts_digest_of(path) if digest.startswith(_CUTS) else _digest_of(path)
        except OSError as error:
            raise DataError(
                f"{path}: cannot read a value of the journal ({error.strerror or error})."
            ) from error
        if found != digest:
            raise _damaged(path)
        return path

    def keep_only(self, digests: Collection[str]) -> None:
        """Deletes all values but those named in ``digests``, and partial files left by a crash."""
        with disk_errors(self._folder):
            for path in self._folder.iterdir():
                if path.name not in digests:
                    path.unlink()


def _linked(path: Path, own: Path) -> bool:
    """Hard-links ``path`` as ``own`` and syncs its bytes; returns False if it cannot be linked.

    It cannot if ``own`` exists or the file system refuses. Linking before syncing is safe, as no
    entry refers to a name that did not exist; it saves one of two waits for the disk.
    """
    try:
        os.link(path, own)
    except OSError as error:
        if error.errno not in {errno.EEXIST, *_NO_LINKS}:
            raise
        return False
    try:
        _sync(own)
    except BaseException:
        own.unlink(missing_ok=True)
        raise
    return True


def _replace(path: Path, own: Path) -> None:
    """Syncs the bytes of ``path``, linked or copied, and atomically replaces ``own`` with them."""
    temporary = own.with_suffix(_NEW)
    try:
        temporary.unlink(missing_ok=True)
        try:
            os.link(path, temporary)
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            shutil.copyfile(path, temporary)
        _sync(temporary)
        temporary.replace(own)  # an existing file may be damaged; this one was verified
    finally:
        temporary.unlink(missing_ok=True)  # rename(2) does nothing if both link to the same file


def _damaged(path: Path) -> DataError:
    return DataError(
        f"{path}: its bytes do not match the digest in its name: it is damaged, and was not used."
    )


def _sync(path: Path) -> None:
    descriptor = open_regular(path, what="a value of the journal")
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _cuts_digest_of(path: Path) -> str:
    with os.fdopen(open_regular(path, what="a value of the journal"), "rb", 0) as stream:
        size_bytes = os.fstat(stream.fileno()).st_size

        def value() -> Iterator[bytes]:
            while piece := stream.read(PIECE_BYTES):
                yield piece

        return _CUTS + digest_of_cuts([*cut_digests(value(), size_bytes)], size_bytes)


def _digest_of(path: Path) -> str:
    """Returns the SHA-256 of a file, read in small pieces: it may be too large for memory."""
    with os.fdopen(open_regular(path, what="a value of the journal"), "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
