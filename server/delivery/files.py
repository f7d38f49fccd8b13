"""The files of a release repository as the delivery service reads them: by name and by digest."""

from __future__ import annotations

import os
import stat
import threading
import time
from collections.abc import Callable
from pathlib import Path

from fedcore.errors import DataError
from fedcore.rpc.delivery import is_metadata_name, is_sha256

_SCAN_S = 1.0
"""Least seconds between two scans for a digest that is not known."""


class PublishedFiles:
    """A repository's files. Nothing is verified: devices do that, with keys that they trust.

    Regular files inside the repository alone are opened, and no symbolic link is followed. Safe for
    use from several threads.
    """

    def __init__(self, repository: Path, clock: Callable[[], float] = time.monotonic) -> None:
        """Reads nothing yet.

        Raises:
            DataError: the folder contains no repository.
        """
        if not (repository / "metadata").is_dir():
            raise DataError(
                f"{repository}: expected a release repository, with a folder `metadata`, found "
                "none. Nothing was started; create one with `fedcore release init`."
            )
        self._repository = repository.resolve()
        self._clock = clock
        self._lock = threading.Lock()
        self._paths: dict[str, Path] = {}
        self._scanned: tuple[int, float] | None = None

    def change(self) -> int:
        """Returns a number that differs after each change of the signed metadata; 0 without any."""
        try:
            found = (self._repository / "metadata" / "timestamp.json").stat()
        except OSError:
            return 0
        return hash((found.st_ino, found.st_size, found.st_mtime_ns)) & (2**63 - 1) or 1

    def open_metadata(self, name: str) -> int | None:
        """Opens a metadata file; returns its descriptor, or None if there is no such file."""
        if not is_metadata_name(name):
            return None
        return _opened(self._repository / "metadata" / name)

    def open_file(self, sha256: str) -> int | None:
        """Opens a released file; returns its descriptor, or None if there is no such file."""
        if not is_sha256(sha256):
            return None
        path = self._paths.get(sha256)
        if path is None:
            self._scan()
            path = self._paths.get(sha256)
        return None if path is None else _opened(path)

    def _scan(self) -> None:
        """Lists the released files again, if the repository changed or some time has passed."""
        with self._lock:
            now, before, change = self._clock(), self._scanned, self.change()
            if before and before[0] == change and now - before[1] < _SCAN_S:
                return
            found = {}
            for folder, _, names in os.walk(self._repository / "targets"):
                for name in names:
                    found[name.partition(".")[0]] = Path(folder) / name
            self._paths = {digest: path for digest, path in found.items() if is_sha256(digest)}
            self._scanned = (change, now)


def _opened(path: Path) -> int | None:
    """Opens a regular file for reading; returns None if it is anything else or missing."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        return None
    return descriptor
