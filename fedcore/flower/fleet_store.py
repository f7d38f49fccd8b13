"""Flower's object store with large objects in files, so that memory use stays bounded."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, BinaryIO

from flwr.supercore.object_store.in_memory_object_store import InMemoryObjectStore

from fedcore.files import disk_errors
from fedcore.updates.piece_digests import CUT_BYTES, cut_head
from fedcore.updates.pieces import CutFile

LARGE_BYTES = 2**16
_MAX_HELD_BYTES = 2**28
"""Most bytes of small objects in memory; further ones have files, too. Messages and honest replies
have a few kilobytes each; a reply of small objects alone may have 256 MiB."""


@dataclass(frozen=True)
class StoredChunk:
    """A verified chunk at its position in an array's file."""

    joined: CutFile
    place: int
    """Its index in the array; valid because Flower cuts all chunks but the last to one size."""
    size_bytes: int

    def content(self) -> bytes:
        """Returns the object's bytes with Flower's header."""
        with self.joined.path.open("rb", buffering=0) as file:
            body = os.pread(file.fileno(), self.size_bytes, self.place * CUT_BYTES)
        return cut_head(self.size_bytes) + body


@dataclass(frozen=True)
class ReplyBytes:
    """How much of a reply is where, once it is read."""

    in_memory: int
    in_files: int
    """Bytes of the chunks that lie in files of their arrays, and are never read as a whole."""


class FleetStore(InMemoryObjectStore):
    """Keeps objects larger than `LARGE_BYTES` in files of a folder, until they are deleted.

    So it does with small ones where those in memory already take much.

    Nothing is fsynced: after a crash the folder is emptied, and devices send again.
    """

    def __init__(self, folder: Path) -> None:
        """Makes an empty store over an empty folder."""
        super().__init__()
        self.folder = folder
        self._cuts: dict[str, StoredChunk] = {}
        self._filed = set[str]()
        """Ids of the objects that have a file of their own."""
        self._held: dict[str, int] = {}
        """Sizes of the objects in memory."""
        self._held_bytes = 0

    def add_chunk(self, object_id: str, cut: StoredChunk) -> None:
        """Registers a chunk's bytes in an array's file for the next `put` without content.

        The caller has verified the chunk's digest.
        """
        with self.lock_store:
            self._cuts.setdefault(object_id, cut)

    def remove_chunk(self, object_id: str, cut: StoredChunk) -> None:
        """Reverts `add_chunk`, if no `put` has followed."""
        with self.lock_store:
            entry = self.store.get(object_id)
            if self._cuts.get(object_id) is cut and not (entry and entry.is_available):
                del self._cuts[object_id]

    def joined(self, chunks: Sequence[str], own: Collection[CutFile]) -> CutFile | None:
        """Returns the file of ``own`` that contains exactly these chunks, in order.

        A small last chunk arrives in memory, and is now appended to the file. Returns None if there
        is no such file: the caller must then concatenate the chunks.

        Raises:
            DiskFull: the disk has no room.
        """
        if not chunks:
            return None
        *whole, last = chunks
        with self.lock_store:
            cuts = [self._cuts.get(each) for each in whole]
            end, entry = self._cuts.get(last), self.store.get(last)
        file = next((one for one in own if cuts and cuts[0] and cuts[0].joined is one), None)
        if file is None and end is not None and not whole:
            file = next((one for one in own if end.joined is one), None)
        expected = (
            [StoredChunk(file, place, CUT_BYTES) for place in range(len(whole))] if file else []
        )
        if file is None or cuts != expected:
            return None
        if end is not None:
            if end.joined is not file or end.place != len(whole):
                return None
            size_bytes = len(whole) * CUT_BYTES + end.size_bytes
        else:
            content = entry.content if entry is not None else b""
            body = content[content.find(b"\0") + 1 :]
            if not body or content != cut_head(len(body)) + body:
                return None
            size_bytes = len(whole) * CUT_BYTES + len(body)
            with disk_errors(file.path):
                _write(file.path, body, len(whole) * CUT_BYTES)
        # A later chunk in the file would make it longer.
        return file if file.path.stat().st_size == size_bytes else None

    def put(self, object_id: str, object_content: bytes) -> None:
        """Stores an announced object, after verifying its digest."""
        if not object_content:
            with self.lock_store:
                if object_id in self._cuts and object_id in self.store:
                    self.store[object_id].is_available = True
                    return
        super().put(object_id, object_content)
        with self.lock_store:
            entry = self.store.get(object_id)
            if entry is None or not entry.content or object_id in self._held:
                return
            size_bytes = len(entry.content)
            if size_bytes <= LARGE_BYTES and self._held_bytes + size_bytes <= _MAX_HELD_BYTES:
                self._held[object_id] = size_bytes
                self._held_bytes += size_bytes
                return
            path = self._path(object_id)
            self._filed.add(object_id)
            with disk_errors(path):
                path.write_bytes(object_content)
            entry.content = b""

    def get(self, object_id: str) -> bytes | None:
        """Returns an object: empty if it has not arrived, None if it was not announced."""
        with self.lock_store:
            entry = self.store.get(object_id)
            if entry is None:
                return None
            if entry.is_available and object_id in self._cuts:
                return self._cuts[object_id].content()
            if entry.is_available and not entry.content:
                return self._path(object_id).read_bytes()
            return entry.content

    def small(self, object_id: str) -> bytes:
        """Returns an object that is in memory; empty for one in a file, or that has not arrived."""
        with self.lock_store:
            entry = self.store.get(object_id)
            return entry.content if entry is not None and entry.is_available else b""

    def open(self, object_id: str) -> BinaryIO | None:
        """Opens an object that has a file of its own; None for others.

        The caller closes it. It stays readable to its end even if the object is deleted meanwhile.
        """
        with self.lock_store:
            entry = self.store.get(object_id)
            if entry is None or not entry.is_available or entry.content:
                return None
            if object_id in self._cuts:
                return None
            return self._path(object_id).open("rb")

    def scratch(self) -> IO[bytes]:
        """Creates an unnamed file to assemble objects in; closing deletes it.

        Raises:
            DiskFull: the disk has no room.
        """
        with disk_errors(self.folder):
            return tempfile.TemporaryFile(dir=self.folder)

    def has_arrived(self, object_id: str) -> bool:
        """Returns whether an object has arrived."""
        with self.lock_store:
            entry = self.store.get(object_id)
            return entry is not None and entry.is_available

    def sizes(self, object_ids: Collection[str]) -> ReplyBytes:
        """Returns the sizes of the objects that have arrived, from any sender."""
        in_memory = in_files = 0
        with self.lock_store:
            for object_id in object_ids:
                entry = self.store.get(object_id)
                if object_id in self._cuts:
                    in_files += self._cuts[object_id].size_bytes
                elif entry is not None and entry.content:
                    in_memory += len(entry.content)
                elif object_id in self._filed:
                    in_memory += self._path(object_id).stat().st_size
        return ReplyBytes(in_memory, in_files)

    def hold(self, object_ids: Collection[str]) -> None:
        """Keeps announced objects until `release`, whatever others have announced about them.

        Flower counts an object's parents alone, and believes the first sender's list of them.
        """
        with self.lock_store:
            for object_id in object_ids:
                self.store[object_id].ref_count += 1

    def release(self, object_ids: Collection[str]) -> None:
        """Reverts `hold`, and deletes those objects that nothing else refers to."""
        with self.lock_store:
            for object_id in object_ids:
                self.store[object_id].ref_count -= 1
            for object_id in object_ids:
                self.delete(object_id)

    def delete(self, object_id: str) -> None:
        """Deletes an object, and its descendants that no other object refers to."""
        with self.lock_store:
            super().delete(object_id)
            if object_id not in self.store:
                self._cuts.pop(object_id, None)
                self._held_bytes -= self._held.pop(object_id, 0)
                if object_id in self._filed:  # asking the system for each small one takes longer
                    self._filed.discard(object_id)
                    self._path(object_id).unlink(missing_ok=True)

    def _path(self, object_id: str) -> Path:
        return self.folder / object_id


def _write(path: Path, raw: bytes, place: int) -> None:
    with path.open("r+b") as file:
        file.seek(place)
        file.write(raw)
