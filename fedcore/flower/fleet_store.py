"""Flower's object store with its large objects on disk, so that memory does not grow with them."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import IO, BinaryIO

from flwr.supercore.object_store.in_memory_object_store import InMemoryObjectStore

from fedcore.files import disk_errors

LARGE_BYTES = 2**16


class FleetStore(InMemoryObjectStore):
    """Keeps what is larger than `LARGE_BYTES` in files of a folder, until it is deleted.

    Nothing is synced: after a crash the folder is emptied, and devices send anew.
    """

    def __init__(self, folder: Path) -> None:
        """An empty store over an empty folder."""
        super().__init__()
        self.folder = folder

    def put(self, object_id: str, object_content: bytes) -> None:
        """Keeps an object that was announced, once its digest was verified."""
        super().put(object_id, object_content)
        if len(object_content) <= LARGE_BYTES:
            return
        path = self._path(object_id)
        with self.lock_store:
            entry = self.store.get(object_id)
            if entry is not None and entry.content:
                with disk_errors(path):
                    path.write_bytes(object_content)
                entry.content = b""

    def get(self, object_id: str) -> bytes | None:
        """An object; empty when it has not come yet, None when it was not announced."""
        with self.lock_store:
            entry = self.store.get(object_id)
            if entry is None:
                return None
            if entry.is_available and not entry.content:
                return self._path(object_id).read_bytes()
            return entry.content

    def open(self, object_id: str) -> BinaryIO | None:
        """An object that lies in a file, to be read in pieces; None when it does not.

        Whoever reads it closes it. It can be read to its end even if it is deleted meanwhile.
        """
        with self.lock_store:
            entry = self.store.get(object_id)
            if entry is None or not entry.is_available or entry.content:
                return None
            return self._path(object_id).open("rb")

    def scratch(self) -> IO[bytes]:
        """A file for what is put together from objects; it is gone once it is closed.

        Raises:
            DiskFull: there was no room.
        """
        with disk_errors(self.folder):
            return tempfile.TemporaryFile(dir=self.folder)

    def is_there(self, object_id: str) -> bool:
        """Whether an object has come."""
        with self.lock_store:
            entry = self.store.get(object_id)
            return entry is not None and entry.is_available

    def delete(self, object_id: str) -> None:
        """Deletes an object, and what no other object refers to."""
        with self.lock_store:
            super().delete(object_id)
            if object_id not in self.store:
                self._path(object_id).unlink(missing_ok=True)

    def _path(self, object_id: str) -> Path:
        return self.folder / object_id
