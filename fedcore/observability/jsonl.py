"""Metrics as JSON lines in a file, for whatever reads a run afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path

from fedcore.files import disk_errors
from fedcore.observability.events import Event, Sink, StageAdvanced, StageStarted, json_line


@contextmanager
def json_lines(path: Path) -> Iterator[Sink]:
    """A sink that writes what an event measured to ``path``, one JSON object a line.

    A file of an earlier run is replaced. Where a stage stands at the moment is progress and not
    kept.

    Raises:
        DiskFull: there was no room for a line; the file then holds the lines before it.
    """
    with appending(path) as append:

        def sink(event: Event) -> None:
            if not isinstance(event, StageStarted | StageAdvanced):
                append((json_line(event) + "\n").encode())

        yield sink


@contextmanager
def appending(path: Path) -> Iterator[Callable[[bytes], None]]:
    """Starts the file ``path`` and gives a function that adds one record to it.

    Guarantee:
        Each record is with the operating system when the function returns, so that another program
        can follow the file; one that does not fit on the disk is taken back whole.

    Raises:
        DiskFull: there was no room.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with disk_errors(path):
        file = FileIO(path, "wb")

    def append(record: bytes) -> None:
        end = file.tell()
        with disk_errors(path):
            try:
                written = 0
                while written < len(record):  # a disk that fills up takes a part of it first
                    written += file.write(record[written:])
            except OSError:
                file.truncate(end)
                file.seek(end)
                raise

    with file:
        yield append
