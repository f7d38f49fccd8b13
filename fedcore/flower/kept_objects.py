"""Objects of messages that a device keeps on disk: the frozen parameters of a run's model.

Each is a file named by its id, the SHA-256 of its content, in a folder for each run.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from flwr.app import RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects

from fedcore.files import disk_errors, name_exists, read_if_exists, remove, sha256_hex, write_atomic
from fedcore.updates.messages import FROZEN

_MAX_BYTES = 1 << 30
"""Most bytes of one object; Flower cuts arrays into chunks of some 20 MiB."""
_ID = 64  # hexadecimal digits of a SHA-256


@dataclass(frozen=True)
class KeptObjects:
    """The objects that a device keeps of one run."""

    folder: Path

    def get(self, object_id: str) -> bytes | None:
        """Returns an object's content; None if it is not kept. Removes a damaged file.

        Args:
            object_id: An id as the server announces it; any text.

        Raises:
            DataError: the file cannot be read.
            ResourceError: a damaged file may not be removed.
        """
        if len(object_id) != _ID or not object_id.isalnum() or not object_id.isascii():
            return None
        path = self.folder / object_id
        raw = read_if_exists(path, max_bytes=_MAX_BYTES, what="a kept object")
        if raw is None or sha256_hex(raw) == object_id:
            return raw
        with disk_errors(path):
            remove(path)  # `keep` writes it again
        return None

    def keep(self, content: RecordDict) -> bool:
        """Keeps the objects of a message's frozen parameters, and no others.

        Returns:
            Whether the message has any.

        Raises:
            DiskFull: there is no room.
        """
        record = content.get(FROZEN)
        if record is None:
            return False
        objects = get_all_nested_objects(record)
        for object_id, one in objects.items():
            if not name_exists(self.folder / object_id):
                with disk_errors(self.folder):
                    self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
                write_atomic(self.folder / object_id, one.deflate(), mode=0o600)
        with disk_errors(self.folder):
            for path in self.folder.iterdir():
                if path.name not in objects:
                    remove(path)
        return True

    def drop(self) -> None:
        """Removes all objects of the run.

        Raises:
            ResourceError: a file may not be removed.
        """
        with disk_errors(self.folder):
            if self.folder.is_dir():
                for path in self.folder.iterdir():
                    remove(path)
                self.folder.rmdir()
