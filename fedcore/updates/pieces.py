"""Arrays by pieces: what is large is looked at, kept and added up without being held as a whole."""

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
"""Of a piece: small enough for the processor's cache."""


class FileArray(Array):
    """An array whose bytes lie in a file, and are read each time that they are asked for.

    The file is this array's own, and is closed with it. Whoever asks for ``data`` gets all of it in
    memory; `pieces` gives the same bytes one piece at a time.
    """

    cuts: Sequence[str] | None = None
    """Digests of its cuts, see `fedcore.updates.cuts`, where they were computed as they came in."""

    def __init__(self, dtype: str, shape: tuple[int, ...], stype: str, file: IO[bytes]) -> None:
        """Takes ``file`` over; all of it, to its end, is the array's bytes."""
        self.dtype, self.shape, self.stype = dtype, shape, stype
        self.file = file
        self.size_bytes = os.fstat(file.fileno()).st_size
        weakref.finalize(self, file.close)

    @property
    def data(self) -> bytes:  # type: ignore[override]
        """All bytes, read again."""
        return self.read(0, self.size_bytes)

    def deflate(self) -> bytes:
        """What stands for it on the wire: the same as for an array in memory."""
        return Array(self.dtype, self.shape, self.stype, self.data).deflate()

    def read(self, start: int, count: int) -> bytes:
        """``count`` bytes from ``start`` on.

        Raises:
            OSError: the file cannot be read, or has become shorter.
        """
        with self.descriptor() as descriptor:
            return _read(descriptor, start, count)

    @contextmanager
    def descriptor(self) -> Iterator[int]:
        """The file's descriptor, to read from as long as the block lasts."""
        yield self.file.fileno()


class KeptArray(FileArray):
    """An array in a file that others keep by its path: it is open only while it is read.

    So thousands of them can be held without a descriptor each. The path must stand as long as the
    array is read.
    """

    def __init__(self, dtype: str, shape: tuple[int, ...], stype: str, path: Path) -> None:
        """An array of all bytes of the file at ``path``."""
        self.dtype, self.shape, self.stype = dtype, shape, stype
        self.path = path
        self.size_bytes = path.stat().st_size

    @contextmanager
    def descriptor(self) -> Iterator[int]:
        """The file's descriptor, to read from as long as the block lasts."""
        descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            yield descriptor
        finally:
            os.close(descriptor)


class Joined:
    """A file that an array's cuts are written into, each at its place; it goes with its last user.

    Whoever links it elsewhere keeps its bytes: from then on nobody may write into it.
    """

    def __init__(self, folder: Path) -> None:
        """Makes an empty one in ``folder``."""
        descriptor, name = tempfile.mkstemp(dir=folder, prefix="joined-")
        os.close(descriptor)
        self.path = Path(name)
        weakref.finalize(self, self.path.unlink, missing_ok=True)


class JoinedArray(KeptArray):
    """An array whose bytes came in by cuts and lie in a file of their own, each cut verified."""

    cuts: Sequence[str]

    def __init__(
        self, dtype: str, shape: tuple[int, ...], stype: str, joined: Joined, cuts: Sequence[str]
    ) -> None:
        """An array of all bytes of ``joined``, whose cuts have the digests ``cuts``."""
        super().__init__(dtype, shape, stype, joined.path)
        self.joined, self.cuts = joined, cuts


def _read(descriptor: int, start: int, count: int) -> bytes:
    read = os.pread(descriptor, count, start)
    while len(read) < count:  # the system may give less than it was asked for
        more = os.pread(descriptor, count - len(read), start + len(read))
        if not more:
            raise OSError(f"an array's file ends after {start + len(read)} bytes")
        read += more
    return read


def size_of(array: Array) -> int:
    """Bytes of an array as it travels."""
    return array.size_bytes if isinstance(array, FileArray) else len(array.data)


def pieces(array: Array, start: int = 0) -> Iterator[bytes | memoryview]:
    """The bytes of an array from ``start`` on, `PIECE_BYTES` at a time; the last may be shorter."""
    if not isinstance(array, FileArray):
        whole = memoryview(array.data)
        yield from (
            whole[place : place + PIECE_BYTES] for place in range(start, len(whole), PIECE_BYTES)
        )
        return
    with array.descriptor() as descriptor:
        for place in range(start, array.size_bytes, PIECE_BYTES):
            yield _read(descriptor, place, min(PIECE_BYTES, array.size_bytes - place))
