"""Content-addressed store for large values: one file each in one folder, named by its digest."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from fedcore.errors import DataError
from fedcore.files import disk_errors, open_regular, read_bytes, sync_folder
from fedcore.flower.writeback import Writeback
from fedcore.updates.piece_digests import cut_digests, digest_of_cuts
from fedcore.updates.pieces import PIECE_BYTES

_NEW = ".new"
_BEGINNING_BYTES = 4096
"""Bytes by which two values are told apart, before either is hashed."""
_EARLY_BYTES = 2**22
"""Bytes of a file after which the disk is asked to write them."""
_MAX_SYNCS = 8
"""Most files that are synced at the same time, each in a thread of its own."""
_NO_LINKS = {errno.EXDEV, errno.EPERM, errno.ENOTSUP, errno.EMLINK}
_CUTS = "cuts-"
"""Prefix of a file name that is the digest over the digests of the value's cuts (chunks)."""
Pieces = Callable[[], Iterable[bytes | memoryview]]
"""Returns an iterator over a value's bytes, in order; may be called more than once."""


class Blobs:
    """Durable store of values by digest; equal values share a file.

    Values are added in a block of `adding`. One written with `NewBlobs.put` is named by its
    SHA-256. A file added with `NewBlobs.adopt` is named by the digest over the digests of its cuts,
    which were computed as it arrived.
    """

    def __init__(self, folder: Path) -> None:
        """Creates ``folder`` if it does not exist, and stores all values in it."""
        self._folder = folder
        self._remover = ThreadPoolExecutor(1, thread_name_prefix="removal")
        self._removal: Future[None] | None = None
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)

    @contextmanager
    def adding(self) -> Iterator[NewBlobs]:
        """Context manager in which values are added; at its end all of them are durable.

        Raises:
            DiskFull: the disk is full. None of the values was added.
            ResourceError: `keep_only` failed to delete a value.
        """
        self._await_removal()
        new = NewBlobs(self._folder)
        try:
            yield new
            new.sync()
        except BaseException:
            new.remove()
            raise

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

    def checked(self, digest: str, size: int) -> Path:
        """Returns the file of the value of ``size`` bytes named ``digest``, after verifying it.

        Raises:
            DataError: the file is missing, has another size, or does not match ``digest``.
        """
        path = self._folder / digest
        try:
            if path.stat().st_size != size:  # before any of it is read: it may be very large
                raise _damaged(path)
            found = _cuts_digest_of(path) if digest.startswith(_CUTS) else _digest_of(path)
        except OSError as error:
            raise DataError(
                f"{path}: cannot read a value of the journal ({error.strerror or error})."
            ) from error
        if found != digest:
            raise _damaged(path)
        return path

    def keep_only(self, digests: Collection[str]) -> None:
        """Deletes all values but those named in ``digests``, and partial files left by a crash.

        Does so in a thread, as the disk may take 10 ms for each file; the next `adding`, or
        `close`, waits for its end and raises its error.
        """
        self._await_removal()
        with disk_errors(self._folder):
            others = [path for path in self._folder.iterdir() if path.name not in digests]
        if others:
            self._removal = _begun(self._remover, partial(_remove, others))

    def close(self) -> None:
        """Waits until no value is being deleted any more.

        Raises:
            ResourceError: a value cannot be deleted.
        """
        self._remover.shutdown()
        self._await_removal()

    def _await_removal(self) -> None:
        removal, self._removal = self._removal, None
        if removal is not None:
            removal.result()


class NewBlobs:
    """Values that are being added to a `Blobs`, which makes them durable together at the end.

    The disk then waits once for all of them. Until then nothing may refer to their names.
    """

    def __init__(self, folder: Path) -> None:
        """Starts without values, for the store in ``folder``."""
        self._folder = folder
        self._unsynced: list[Path] = []
        """Files under new names, whose bytes may not be on the disk yet."""
        self._named = False
        """Whether the folder may have entries that are not on the disk yet."""

    def put(self, value: Pieces) -> str:
        """Writes a value and returns its digest.

        Keeps only one piece in memory at a time, unless the caller has the whole value in memory.

        Raises:
            DiskFull: the disk is full. No partial file is left.
        """
        self._named = True  # also if the value is there: an earlier sync may have failed
        if self._may_be_there(value):
            digest = _digest_of_value(value)
            path = self._folder / digest
            if path.is_file() and _digest_of(path) == digest:
                return digest
        temporary = self._folder / f"value{_NEW}"
        with disk_errors(temporary):
            try:
                digest = _written(value, temporary)
                temporary.replace(self._folder / digest)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
        return digest

    def _may_be_there(self, value: Pieces) -> bool:
        """Returns whether a file begins as the value does."""
        beginning = bytes(next(iter(value()), b"")[:_BEGINNING_BYTES])
        plain = (path for path in self._folder.iterdir() if not path.name.startswith(_CUTS))
        return any(_begins(path, beginning) for path in plain)

    def adopt(self, path: Path, cuts: Sequence[str], size_bytes: int) -> str:
        """Adds the file at ``path`` as a value, and returns the value's name.

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
        self._named = True
        with disk_errors(own):
            if _linked(path, own):
                self._unsynced.append(own)
            else:
                _replace(path, own)
        return name

    def sync(self) -> None:
        """Makes all values durable: they survive a power cut.

        The files and their folder are synced at the same time, as the file system then writes what
        belongs to all of them once.

        Raises:
            DiskFull: the disk is full.
        """
        if not self._named:
            return
        with ThreadPoolExecutor(_MAX_SYNCS) as pool:
            waits = [_begun(pool, partial(_sync, path)) for path in self._unsynced]
            with disk_errors(self._folder):
                sync_folder(self._folder)
        for wait in waits:
            wait.result()
        self._unsynced.clear()

    def remove(self) -> None:
        """Deletes the values that have new names, so that no other use finds them half written."""
        for path in self._unsynced:
            path.unlink(missing_ok=True)


def _begins(path: Path, beginning: bytes) -> bool:
    """Returns whether a file begins so; False if it cannot be read, as a value is then written."""
    try:
        with os.fdopen(open_regular(path, what="a value of the journal"), "rb", 0) as file:
            return file.read(len(beginning)) == beginning
    except (OSError, DataError):
        return False


def _digest_of_value(value: Pieces) -> str:
    found = hashlib.sha256()
    for piece in value():
        found.update(piece)
    return found.hexdigest()


def _written(value: Pieces, path: Path) -> str:
    """Writes and syncs a new file, and returns its SHA-256.

    The disk begins to write while later bytes are hashed: the sync at the end then waits less.
    """
    found, begun, written = hashlib.sha256(), 0, 0
    writeback = Writeback()
    try:
        with path.open("wb", buffering=0) as file:
            for piece in value():
                for place in range(0, len(piece), PIECE_BYTES):
                    part = memoryview(piece)[place : place + PIECE_BYTES]
                    found.update(part)
                    written += len(part)
                    while part:  # a disk that fills up accepts part of a write first
                        part = part[file.write(part) :]
                    if written - begun >= _EARLY_BYTES:
                        writeback.begin(os.dup(file.fileno()), begun, written - begun)
                        begun = written
            os.fsync(file.fileno())
    finally:
        writeback.close()
    return found.hexdigest()


def _linked(path: Path, own: Path) -> bool:
    """Hard-links ``path`` as ``own``; returns False if it cannot be linked.

    It cannot if ``own`` exists or the file system refuses. Linking before syncing is safe, as no
    entry refers to a name that did not exist; it saves one of two waits for the disk.
    """
    try:
        os.link(path, own)
    except OSError as error:
        if error.errno not in {errno.EEXIST, *_NO_LINKS}:
            raise
        return False
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


def _begun(pool: ThreadPoolExecutor, work: Callable[[], None]) -> Future[None]:
    """Starts work in a thread, or does it if the system has no thread to give."""
    try:
        return pool.submit(work)
    except RuntimeError:
        work()
        done = Future[None]()
        done.set_result(None)
        return done


def _remove(paths: Sequence[Path]) -> None:
    for path in paths:
        with disk_errors(path):
            path.unlink()


def _damaged(path: Path) -> DataError:
    return DataError(
        f"{path}: its bytes do not match the digest in its name: it is damaged, and was not used."
    )


def _sync(path: Path) -> None:
    with disk_errors(path):
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
