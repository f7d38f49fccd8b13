"""Append-only audit log of operator actions, with one hash-chained JSON line per action.

Each line contains the SHA-256 of the line before it, so that a changed, removed or inserted line is
detected unless everything after it is rewritten, too. A small file next to the log, the mark,
records the log's length, so that truncation is detected as well.
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
from typing import Annotated, Literal

from pydantic import Field, ValidationError

from fedcore.config.section import Section
from fedcore.errors import DataError
from fedcore.files import (
    disk_errors,
    name_exists,
    open_regular,
    read_bytes,
    sync_folder,
    write_atomic,
)

AUDIT, MARK = "audit.jsonl", "audit.mark"
_MAX_MARK_BYTES = 1 << 10
_START = "0" * 64
"""Digest that the first line names as its predecessor."""
_MAX_LINE_BYTES = 1 << 20
"""Maximum bytes of one line; real lines have less than a thousandth of that."""
_PIECE_BYTES = 1 << 16


class _Mark(Section):
    """Content of ``audit.mark``: the end of the log after its last write, or one line less.

    A line is flushed to disk before its mark. A crash between the two leaves a line without a mark,
    and never a mark without its line.
    """

    format: Literal["fedcore.audit/1"] = "fedcore.audit/1"
    end_bytes: Annotated[int, Field(ge=1)]
    """Offset in bytes at which the last marked line ends."""
    last: str
    """SHA-256 of that line."""


class Audit:
    """The audit log in one file. Thread-safe; only one process may write at a time."""

    def __init__(
        self, path: Path, *, clock: Callable[[], datetime] = lambda: datetime.now(UTC)
    ) -> None:
        """Opens the log for appending after its last line; ``path`` need not exist.

        Raises:
            DataError: the path isn't a regular file, or the log was truncated since its last write.
            DiskFull: the disk is full.
            ResourceError: the file isn't writable.
        """
        self._path = path
        self._clock = clock
        self._lock = threading.Lock()
        check_regular(path)
        mark = _read_mark(path)
        if mark is not None and not name_exists(path):
            raise _missing_error(path)
        with disk_errors(path):
            flags = os.O_RDWR | os.O_APPEND | os.O_CREAT
            self._file = open_regular(path, flags, what="the audit log")
            sync_folder(path.parent)
            end = os.fstat(self._file).st_size
            if mark is not None and not (
                _contains_mark(self._file, mark) and end <= _max_end(mark)
            ):
                os.close(self._file)
                raise _truncated_error(path, mark)
            self._last, whole = _digest_before(self._file, end)
            if not whole:  # ends a line that a power cut left unfinished
                os.write(self._file, b"\n")
            self._end = os.fstat(self._file).st_size

    def record(self, *, by: str, action: str, **more: object) -> None:
        """Appends a line and flushes it to disk before returning.

        Raises:
            DataError: the log was removed, replaced or truncated in the meantime.
            DiskFull: the disk is full; the caller must not perform the action.
        """
        with self._lock:
            entry = {
                "at": f"{self._clock():%Y-%m-%dT%H:%M:%SZ}",
                "by": by,
                "action": action,
                **more,
                "before": self._last,
            }
            line = json.dumps(entry).encode()
            with disk_errors(self._path):
                end = os.fstat(self._file).st_size
                if not self._in_place() or end < self._end:
                    raise _replaced_error(self._path)
                try:
                    if os.write(self._file, line + b"\n") <= len(line):
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                    os.fsync(self._file)
                except OSError:
                    os.ftruncate(self._file, end)
                    raise
            self._last, self._end = hashlib.sha256(line).hexdigest(), end + len(line) + 1
            mark = _Mark(end_bytes=self._end, last=self._last)
            write_atomic(_mark_of(self._path), mark.model_dump_json().encode() + b"\n", mode=0o600)

    def _in_place(self) -> bool:
        """Returns whether the path still refers to the open file."""
        try:
            return os.path.samestat(os.fstat(self._file), self._path.stat())
        except FileNotFoundError:
            return False

    def close(self) -> None:
        """Closes the log."""
        os.close(self._file)


def verify_audit(path: Path, *, begun_loose: bool = False) -> int:
    """Verifies the hash chain and the log's length; returns the number of lines.

    Args:
        path: The log.
        begun_loose: Whether the first lines may come from a version that didn't chain lines.

    Raises:
        DataError: the file can't be read, a line doesn't name its predecessor, or lines at the end
            are missing.
    """
    check_regular(path)
    mark = _read_mark(path)  # read first: a running server may append a line afterwards
    last, number, end, torn = _START, 0, 0, False
    reached = mark is None
    try:
        with os.fdopen(open_regular(path, what="the audit log"), "rb") as stream:
            if mark is not None and os.fstat(stream.fileno()).st_size > _max_end(mark):
                raise _truncated_error(path, mark)
            for number, line in enumerate(iter(lambda: stream.readline(_MAX_LINE_BYTES), b""), 1):
                if len(line) == _MAX_LINE_BYTES:
                    raise _overlong_error(path, number)
                before = _predecessor_digest(line)
                if before is None and begun_loose:
                    torn = False
                elif before is None and not torn:
                    torn = True  # a power cut left it unfinished; the next line names it
                elif before != last:
                    raise DataError(
                        f"{path}: line {number} does not follow the line before it: one of them "
                        "was changed, removed or inserted. The lines before it are intact; check "
                        "who has write access to this file."
                    )
                else:
                    torn, begun_loose = False, False
                last = hashlib.sha256(line.rstrip(b"\n")).hexdigest()
                end += len(line)
                reached = reached or (
                    mark is not None and (end, last) == (mark.end_bytes, mark.last)
                )
    except FileNotFoundError:
        raise _missing_error(path) from None
    except OSError as error:
        raise DataError(f"{path}: cannot read the audit log ({error.strerror}).") from None
    if mark is not None and not reached:
        raise _truncated_error(path, mark)
    return number


def check_regular(path: Path) -> None:
    """Rejects anything but a regular or missing file: opening a pipe would block.

    Raises:
        DataError: the path is a folder, a pipe or another special file.
    """
    if name_exists(path) and not path.is_file():
        raise DataError(
            f"{path}: expected the audit log, found a folder, a pipe or another kind of file. "
            "Nothing was done, because it could not be recorded; remove it, restore the log if "
            "there was one, and check who has write access to this folder."
        )


def _mark_of(path: Path) -> Path:
    return path.with_name(MARK)


def _read_mark(path: Path) -> _Mark | None:
    """Reads the mark next to a log; returns None if there is none."""
    mark = _mark_of(path)
    if not os.path.lexists(mark):
        return None
    try:
        raw = read_bytes(mark, max_bytes=_MAX_MARK_BYTES, what="the mark of the audit log")
        return _Mark.model_validate_json(raw)
    except (DataError, ValidationError):
        raise DataError(
            f"{mark}: this file does not state the length of {path.name}. A server refuses to "
            "start with it, because a truncated log would go unnoticed; check who has write "
            f"access here. {_KEEP}"
        ) from None


_KEEP = (
    f"Then move {AUDIT} and {MARK} away together, and keep them: the next server starts a new log."
)


def _missing_error(path: Path) -> DataError:
    return DataError(
        f"{path}: the audit log is missing; {MARK} beside it shows that there was one. A server "
        f"refuses to start without it; restore it, or check who has write access here. {_KEEP}"
    )


def _truncated_error(path: Path, mark: _Mark) -> DataError:
    return DataError(
        f"{path}: the audit log was truncated or changed: expected a line that ends at byte "
        f"{mark.end_bytes}, as recorded in {MARK} beside it, found none, or another line. A "
        "server refuses to start with it; restore the complete log, or check who has write "
        f"access here. {_KEEP}"
    )


def _replaced_error(path: Path) -> DataError:
    return DataError(
        f"{path}: the audit log was removed, replaced or truncated while the server runs. "
        "Requests are refused while they cannot be recorded; restore the log, or check who has "
        f"write access here, and stop the server with SIGTERM. {_KEEP}"
    )


def _predecessor_digest(line: bytes) -> str | None:
    """Returns the digest that a line names as its predecessor; None for an incomplete line."""
    try:
        return str(json.loads(line)["before"])
    except (ValueError, KeyError, TypeError):
        return None


def _contains_mark(file: int, mark: _Mark) -> bool:
    """Returns whether the log contains the line that its mark refers to."""
    there = os.fstat(file).st_size >= mark.end_bytes
    return there and _digest_before(file, mark.end_bytes) == (mark.last, True)


def _max_end(mark: _Mark) -> int:
    """Returns the largest valid size: a crash may leave one line after the marked one."""
    return mark.end_bytes + _MAX_LINE_BYTES


def _overlong_error(path: Path, number: int) -> DataError:
    return DataError(
        f"{path}: line {number} has no end within {_MAX_LINE_BYTES} bytes, longer than any line "
        "of a log. The lines before it are intact; check who has write access to this file."
    )


def _digest_before(file: int, end: int) -> tuple[str, bool]:
    """Returns the digest of the line that ends at byte ``end``, and whether it is complete."""
    if not end:
        return _START, True
    whole = os.pread(file, 1, end - 1) == b"\n"
    stop = end - 1 if whole else end
    start, found = stop, b""
    while start > 0 and b"\n" not in found:
        step = min(_PIECE_BYTES, start)
        start -= step
        found = os.pread(file, step, start) + found
        if len(found) > _MAX_LINE_BYTES:
            raise DataError(
                f"the audit log has no line that ends within {_MAX_LINE_BYTES} bytes before "
                f"byte {end}: it was changed. A server refuses to start with it; check who has "
                "write access to it."
            )
    return hashlib.sha256(found.rpartition(b"\n")[2]).hexdigest(), whole
