"""Large values by their digests, in files of one folder."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path

from fedcore.errors import DataError
from fedcore.files import disk_errors, open_regular, read_bytes, sync_folder
from fedcore.updates.cuts import cut_digests, digest_of_cuts
from fedcore.updates.pieces import PIECE_BYTES

_NEW = ".new"
_NO_LINKS = {errno.EXDEV, errno.EPERM, errno.ENOTSUP, errno.EMLINK}
_CUTS = "cuts-"
"""How the name of a value begins that is named by the digest over those of its cuts."""
Pieces = Callable[[], Iterable[bytes | memoryview]]
"""Gives a value's bytes from the first to the last, each time that it is called."""


class Blobs:
    """Values are written once, durably, under their digests; equal ones share a file.

    What is written here goes by its SHA-256; what came in by cuts, by the digest over theirs.
    """

    def __init__(self, folder: Path) -> None:
        """Keeps to ``folder``, which is made."""
        self._folder = folder
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)

    def put(self, value: Pieces) -> str:
        """Writes a value and returns its digest; it survives a power cut from then on.

        A piece of it is in memory at a time, where it is not there already.

        Raises:
            DiskFull: there was no room; nothing half-written is left.
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
                        while left:  # a disk that fills up takes a part first
                            left = left[stream.write(left) :]
                    os.fsync(stream.fileno())
                temporary.replace(path)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
        sync_folder(self._folder)
        return digest

    def adopt(self, path: Path, cuts: Sequence[str], size_bytes: int) -> str:
        """Takes the file at ``path`` in as a value, and returns its name.

        Nothing is copied, unless the file system has no links or ``path`` is on another one. It
        survives a power cut from then on, whatever becomes of ``path``; nobody may write into
        the file any more.

        Args:
            path: The file.
            cuts: Digests of its cuts, which its bytes were seen to have.
            size_bytes: Of the file.

        Raises:
            DiskFull: there was no room; nothing half-written is left.
        """
        name = _CUTS + digest_of_cuts(cuts, size_bytes)
        own = self._folder / name
        with disk_errors(own):
            if not _linked(path, own):
                _replace(path, own)
        sync_folder(self._folder)
        return name

    def get(self, digest: str, size: int) -> bytes:
        """The value of ``size`` bytes that was written under ``digest``.

        Raises:
            DataError: it is not there, or not what was written.
        """
        path = self._folder / digest
        raw = read_bytes(path, max_bytes=size, what="a value of the journal")
        if hashlib.sha256(raw).hexdigest() != digest:
            raise _damaged(path)
        return raw

    def path(self, digest: str) -> Path:
        """The file of a value that was written under ``digest`` by this process."""
        return self._folder / digest

    def checked(self, digest: str) -> Path:
        """The file of the value that was written under ``digest``, by whatever process.

        Raises:
            DataError: it is not there, or not what was written.
        """
        path = self._folder / digest
        try:
            found = _cuts_digest_of(path) if digest.startswith(_CUTS) else _digest_of(path)
        except OSError as error:
            raise DataError(
                f"{path}: a value of the journal cannot be read ({error.strerror or error})."
            ) from error
        if found != digest:
            raise _damaged(path)
        return path

    def keep_only(self, digests: Collection[str]) -> None:
        """Removes every other value, and what was half-written when a process died."""
        with disk_errors(self._folder):
            for path in self._folder.iterdir():
                if path.name not in digests:
                    path.unlink()


def _linked(path: Path, own: Path) -> bool:
    """Gives the file at ``path`` a second name, with all its bytes on disk; False where it cannot.

    Nothing has that name, so nothing refers to it: it may be seen before its bytes are on disk, and
    the disk is waited for once instead of twice.
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
    """Puts the file at ``path`` in the place of ``own``, once all its bytes are on disk."""
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
        temporary.replace(own)  # an older one may be damaged; this is not
    finally:
        temporary.unlink(missing_ok=True)  # it stays where both were one file already


def _damaged(path: Path) -> DataError:
    return DataError(
        f"{path}: its bytes do not match the digest that it is named by: it is damaged, and was "
        "not used."
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
    """In small pieces: what is there need not fit into memory beside what is written."""
    with os.fdopen(open_regular(path, what="a value of the journal"), "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
