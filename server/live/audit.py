"""What operators did to a server: one line an action, only ever appended to, each line chained.

A line holds the SHA-256 of the line before it, so that a line that is changed, taken out or put in
later shows, unless everything after it is made anew as well.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from fedcore.errors import DataError
from fedcore.files import disk_errors, sync_folder

AUDIT = "audit.jsonl"
_START = "0" * 64
"""What the first line names as the one before it."""
_PIECE_BYTES = 1 << 16


class Audit:
    """The log in one file. Safe to use from several threads; one process at a time writes."""

    def __init__(
        self, path: Path, *, clock: Callable[[], datetime] = lambda: datetime.now(UTC)
    ) -> None:
        """Goes on after the last line of ``path``, which need not exist.

        Raises:
            DiskFull: there is no room.
            ResourceError: it may not be written.
        """
        self._path = path
        self._clock = clock
        self._lock = threading.Lock()
        with disk_errors(path):
            self._file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
            sync_folder(path.parent)
            self._last, whole = _last_digest(self._file)
            if not whole:  # a power cut left it unfinished; closed, it spoils no other
                os.write(self._file, b"\n")

    def record(self, *, by: str, action: str, outcome: str, **more: object) -> None:
        """Appends a line, on disk before this returns.

        Raises:
            DiskFull: there is no room; whoever asks must not go on then.
        """
        with self._lock:
            entry = {
                "at": f"{self._clock():%Y-%m-%dT%H:%M:%SZ}",
                "by": by,
                "action": action,
                "outcome": outcome,
                **more,
                "before": self._last,
            }
            line = json.dumps(entry).encode()
            with disk_errors(self._path):
                end = os.fstat(self._file).st_size
                try:
                    if os.write(self._file, line + b"\n") <= len(line):
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                    os.fsync(self._file)
                except OSError:
                    os.ftruncate(self._file, end)
                    raise
            self._last = hashlib.sha256(line).hexdigest()

    def close(self) -> None:
        """Closes the file."""
        os.close(self._file)


def check_audit(path: Path) -> int:
    """Verifies the chain; returns how many lines there are.

    Raises:
        DataError: the file cannot be read, or a line does not name the one before it.
    """
    last, number, torn = _START, 0, False
    try:
        with path.open("rb") as stream:
            for number, line in enumerate(stream, start=1):
                before = _before(line)
                if before is None and not torn:
                    torn = True  # one that a power cut left unfinished: the next one names it
                elif before != last:
                    raise DataError(
                        f"{path}: line {number} does not follow the line before it: one of them "
                        "was changed, taken out or put in. What stands before it is sound; look "
                        "who may write to this file."
                    )
                else:
                    torn = False
                last = hashlib.sha256(line.rstrip(b"\n")).hexdigest()
    except OSError as error:
        raise DataError(f"{path}: the audit log cannot be read ({error.strerror}).") from None
    return number


def _before(line: bytes) -> str | None:
    """What a line names as the one before it; None when it is no whole line."""
    try:
        return str(json.loads(line)["before"])
    except (ValueError, KeyError, TypeError):
        return None


def _last_digest(file: int) -> tuple[str, bool]:
    """The digest of the last line, and whether that line is whole."""
    end = os.fstat(file).st_size
    if not end:
        return _START, True
    whole = os.pread(file, 1, end - 1) == b"\n"
    stop = end - 1 if whole else end
    start, found = stop, b""
    while start > 0 and b"\n" not in found:
        step = min(_PIECE_BYTES, start)
        start -= step
        found = os.pread(file, step, start) + found
    return hashlib.sha256(found.rpartition(b"\n")[2]).hexdigest(), whole
