"""Arrays in pieces: large arrays are checked, stored and summed without loading them whole."""

from __future__ import annotations

import os
import tempfile
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from flwr.app import Array

PIECE_BYTES = 2**18
"""Size of a piece, small enough for the processor's cache."""


class FileArray(Array):
    """An array whose bytes are in a file, and are read on each access.

    The array owns the file, which closes with it. ``data`` loads all of it into memory; `pieces`
    yields the bytes one piece at a time.
    """

    cuts: Sequence[str] | None = None
    """Digests of its cuts, if computed on arrival, see `fedcore.updates.piece_digests`."""

    def __init__(self, dtype: str, shape: tuple[int, ...], stype: str, file: IO[bytes]) -> None:
        """Takes ownership of ``file``, whose whole content is the array's bytes."""
        self.dtype, self.shape, self.stype = dtype, shape, stype
        self.file = file
        self.size_bytes = os.fstat(file.fileno()).st_size
        weakref.finalize(self, file.close)

    @property
    def data(self) -> bytes:  # type: ignore[override]
        """All bytes, read from the file on each access."""
        return self.read(0, self.size_bytes)

    def deflate(self) -> bytes:
        """Returns the bytes that represent the array on the wire, as for an array in memory."""
        return Array(self.dtype, self.shape, self.stype, self.data).deflate()

    def read(self, start: int, count: int) -> bytes:
        """Returns ``count`` bytes from ``start`` on.

        Raises:
                OSError: the file cannot be read, or is shorter than that.
        """
        with self.descriptor() as descriptor:
            return _read(descriptor, start, count)

    @contextmanager
    def descriptor(self) -> Iterator[int]:
        """Yields a file descriptor for reads inside the block."""
        yield self.file.fileno()


class PathArray(FileArray):
    """An array in a file that others own; the file is open only during a read.

    Thousands of these need no file descriptors. The path must exist as long as the array is read.
    """

    def __init__(self, dtype: str, shape: tuple[int, ...], stype: str, path: Path) -> None:
        """Makes an array of all bytes of the file at ``path``."""
        self.dtype, self.shape, self.stype = dtype, shape, stype
        self.path = path
        self.size_bytes = path.stat().st_size

    @contextmanager
    def descriptor(self) -> Iterator[int]:
        """Yields a file descriptor for reads inside the block, and closes it."""
        descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            yield descriptor
        finally:
            os.close(descriptor)


class CutFile:
    """A file that receives an array's cuts, each at its position; deleted with its last user.

    A hard link to it preserves the bytes; after linking, nobody may write to it.
    """

    def __init__(self, folder: Path) -> None:
        """Creates an empty file in ``folder``."""
        descriptor, name = tempfile.mkstemp(dir=folder, prefix="joined-")
        os.close(descriptor)
        self.path = Path(name)
        weakref.finalize(self, self.path.unlink, missing_ok=True)


class CutFileArray(PathArray):
    """An array that arrived in cuts, in a file of its own; each cut's digest was verified."""

    cuts: Sequence[str]

    def __init__(
        self, dtype: str, shape: tuple[int, ...], stype: str, joined: CutFile, cuts: Sequence[str]
    ) -> None:
        """Makes an array of all bytes of ``joined``; ``cuts`` are the digests of its cuts."""
        super().__init__(dtype, shape, stype, joined.path)
        self.joined, self.cuts = joined, cuts


def _read(descriptor: int, start: int, count: int) -> bytes:
    read = os.pread(descriptor, count, start)
    while len(read) < count:  # pread may return fewer bytes than requested
        more = os.pread(descriptor, count - len(read), start + len(read))
        if not more:
            raise OSError(f"an array's file ends after {start + len(read)} bytes")
        read += more
    return read


def size_of(array: Array) -> int:
    """Returns the number of bytes of an array in a message."""
    return array.size_bytes if isinstance(array, FileArray) else len(array.data)


def pieces(array: Array, start: int = 0) -> Iterator[bytes | memoryview]:
    """Yields an array's bytes from ``start``, `PIECE_BYTES` at a time; the last may be shorter."""
    if not isinstance(array, FileArray):
        whole = memoryview(array.data)
        yield from (
            whole[place : place + PIECE_BYTES] for place in range(start, len(whole), PIECE_BYTES)
        )
        return
    with array.descriptor() as descriptor:
        for place in range(start, array.size_bytes, PIECE_BYTES):
            yield _read(descriptor, place, min(PIECE_BYTES, array.size_bytes - place))
