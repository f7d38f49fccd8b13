"""What operators did to a server: one line an action, only ever appended to, each line chained.

A line holds the SHA-256 of the line before it, so that a line that is changed, taken out or put in
later shows, unless all that follows is made again as well. A small file beside it, the mark, says
how far the log went, so that lines cut from its end show as well.
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

from fedcore.config.run import Section
from fedcore.errors import DataError
from fedcore.files import disk_errors, is_there, open_regular, read_bytes, sync_folder, write_atomic

AUDIT, MARK = "audit.jsonl", "audit.mark"
_MAX_MARK_BYTES = 1 << 10
_START = "0" * 64
"""What the first line names as the one before it."""
_MOST_LINE_BYTES = 1 << 20
"""Of one line of a log; none has a thousandth of that."""
_PIECE_BYTES = 1 << 16


class _Mark(Section):
    """``audit.mark``: how far the log went when it was last written to, or a line less.

    A line is on disk before its mark is: a stop between the two leaves a line that no mark tells
    of, and never a mark without its line.
    """

    format: Literal["fedcore.audit/1"] = "fedcore.audit/1"
    end_bytes: Annotated[int, Field(ge=1)]
    """Where the line ended."""
    last: str
    """Its SHA-256."""


class Audit:
    """The log in one file. Safe to use from several threads; one process at a time writes."""

    def __init__(
        self, path: Path, *, clock: Callable[[], datetime] = lambda: datetime.now(UTC)
    ) -> None:
        """Goes on after the last line of ``path``, which need not exist.

        Raises:
            DataError: it is no regular file, or was cut since it was last written to.
            DiskFull: there is no room.
            ResourceError: it may not be written.
        """
        self._path = path
        self._clock = clock
        self._lock = threading.Lock()
        check_regular(path)
        mark = _read_mark(path)
        if mark is not None and not is_there(path):
            raise _gone(path)
        with disk_errors(path):
            flags = os.O_RDWR | os.O_APPEND | os.O_CREAT
            self._file = open_regular(path, flags, what="the audit log")
            sync_folder(path.parent)
            end = os.fstat(self._file).st_size
            if mark is not None and not (_reaches(self._file, mark) and end <= _furthest(mark)):
                os.close(self._file)
                raise _cut(path, mark)
            self._last, whole = _digest_before(self._file, end)
            if not whole:  # a power cut left it unfinished; closed, it spoils no other
                os.write(self._file, b"\n")
            self._end = os.fstat(self._file).st_size

    def record(self, *, by: str, action: str, **more: object) -> None:
        """Appends a line, on disk before this returns.

        Raises:
            DataError: the log was removed, replaced or cut meanwhile; as below.
            DiskFull: there is no room; whoever asks must not go on then.
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
                    raise _meanwhile(self._path)
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
        """Whether the path still leads to the file that is written."""
        try:
            return os.path.samestat(os.fstat(self._file), self._path.stat())
        except FileNotFoundError:
            return False

    def close(self) -> None:
        """Closes the file."""
        os.close(self._file)


def check_audit(path: Path, *, begun_loose: bool = False) -> int:
    """Verifies the chain, and that it goes as far as it did; returns how many lines there are.

    Args:
        path: The log.
        begun_loose: Whether the first lines may be of a version that chained none.

    Raises:
        DataError: the file cannot be read, a line does not name the one before it, or lines at the
            end are missing.
    """
    check_regular(path)
    mark = _read_mark(path)  # first: a server that runs may write a line after it
    last, number, end, torn = _START, 0, 0, False
    reached = mark is None
    try:
        with os.fdopen(open_regular(path, what="the audit log"), "rb") as stream:
            if mark is not None and os.fstat(stream.fileno()).st_size > _furthest(mark):
                raise _cut(path, mark)
            for number, line in enumerate(iter(lambda: stream.readline(_MOST_LINE_BYTES), b""), 1):
                if len(line) == _MOST_LINE_BYTES:
                    raise _endless(path, number)
                before = _before(line)
                if before is None and begun_loose:
                    torn = False
                elif before is None and not torn:
                    torn = True  # one that a power cut left unfinished: the next one names it
                elif before != last:
                    raise DataError(
                        f"{path}: line {number} does not follow the line before it: one of them "
                        "was changed, taken out or put in. What stands before it is sound; look "
                        "who may write to this file."
                    )
                else:
                    torn, begun_loose = False, False
                last = hashlib.sha256(line.rstrip(b"\n")).hexdigest()
                end += len(line)
                reached = reached or (
                    mark is not None and (end, last) == (mark.end_bytes, mark.last)
                )
    except FileNotFoundError:
        raise _gone(path) from None
    except OSError as error:
        raise DataError(f"{path}: the audit log cannot be read ({error.strerror}).") from None
    if mark is not None and not reached:
        raise _cut(path, mark)
    return number


def check_regular(path: Path) -> None:
    """Sees that a log is a file, or not there yet: opening a pipe would wait for its other end.

    Raises:
        DataError: it is something else.
    """
    if is_there(path) and not path.is_file():
        raise DataError(
            f"{path}: expected the audit log, found a folder, a pipe or something else of that "
            "name. Nothing was done, since nothing could be recorded; remove it, put the log back "
            "where there was one, and see who may write to this folder."
        )


def _mark_of(path: Path) -> Path:
    return path.with_name(MARK)


def _read_mark(path: Path) -> _Mark | None:
    """The mark beside a log; None where none was written."""
    mark = _mark_of(path)
    if not os.path.lexists(mark):
        return None
    try:
        raw = read_bytes(mark, max_bytes=_MAX_MARK_BYTES, what="the mark of the audit log")
        return _Mark.model_validate_json(raw)
    except (DataError, ValidationError):
        raise DataError(
            f"{mark}: this does not tell how far {path.name} went. No server starts with it, since "
            f"a log that was cut would not show; look who may write here. {_KEEP}"
        ) from None


_KEEP = (
    f"Then put {AUDIT} and {MARK} away together, and keep them: the next server begins a new log."
)


def _gone(path: Path) -> DataError:
    return DataError(
        f"{path}: the audit log is gone; {MARK} beside it says that there was one. No server "
        f"starts without it; put it back, or look who may write here. {_KEEP}"
    )


def _cut(path: Path, mark: _Mark) -> DataError:
    return DataError(
        f"{path}: the audit log was cut or changed: expected a line that ends at byte "
        f"{mark.end_bytes}, as {MARK} beside it says, and there is none, or another. No server "
        f"starts with it; put the whole log back, or look who may write here. {_KEEP}"
    )


def _meanwhile(path: Path) -> DataError:
    return DataError(
        f"{path}: the audit log was removed, replaced or cut while the server runs. Nothing is "
        "done unrecorded; put it back as it was, or look who may write here, and stop the server "
        f"with SIGTERM. {_KEEP}"
    )


def _before(line: bytes) -> str | None:
    """What a line names as the one before it; None when it is no whole line."""
    try:
        return str(json.loads(line)["before"])
    except (ValueError, KeyError, TypeError):
        return None


def _reaches(file: int, mark: _Mark) -> bool:
    """Whether the log holds the line that its mark tells of."""
    there = os.fstat(file).st_size >= mark.end_bytes
    return there and _digest_before(file, mark.end_bytes) == (mark.last, True)


def _furthest(mark: _Mark) -> int:
    """Where a log may end at most: a process that dies before it marks a line has written one."""
    return mark.end_bytes + _MOST_LINE_BYTES


def _endless(path: Path, number: int) -> DataError:
    return DataError(
        f"{path}: line {number} has no end within {_MOST_LINE_BYTES} bytes, and no line of a log "
        "is as long. What stands before it is sound; look who may write to this file."
    )


def _digest_before(file: int, end: int) -> tuple[str, bool]:
    """The digest of the line that ends at byte ``end``, and whether that line is whole."""
    if not end:
        return _START, True
    whole = os.pread(file, 1, end - 1) == b"\n"
    stop = end - 1 if whole else end
    start, found = stop, b""
    while start > 0 and b"\n" not in found:
        step = min(_PIECE_BYTES, start)
        start -= step
        found = os.pread(file, step, start) + found
        if len(found) > _MOST_LINE_BYTES:
            raise DataError(
                f"the audit log has no line that ends within {_MOST_LINE_BYTES} bytes before byte "
                f"{end}: it was changed. No server starts with it; look who may write to it."
            )
    return hashlib.sha256(found.rpartition(b"\n")[2]).hexdigest(), whole
