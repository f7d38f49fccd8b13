"""Writes a run's events to a file as JSON lines, for programs that read the run afterwards."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path

from fedcore.files import disk_errors, open_regular
from fedcore.observability.events import (
    Event,
    Sink,
    StageAdvanced,
    StageStarted,
    TrainingAdvanced,
    json_line,
)

log = logging.getLogger("fedcore")

_PROGRESS = StageStarted | StageAdvanced | TrainingAdvanced


@contextmanager
def json_lines(path: Path) -> Iterator[Sink]:
    """Yields a sink that writes each event to ``path``, one JSON object a line.

    Replaces a file of an earlier run. Leaves out `StageStarted`, `StageAdvanced` and
    `TrainingAdvanced`, which only show progress.

    Raises:
        DiskFull: the disk has no room for a line; the file then contains the lines before it.
    """
    with appending(path) as append:

        def sink(event: Event) -> None:
            if not isinstance(event, _PROGRESS):
                append((json_line(event) + "\n").encode())

        yield sink


@contextmanager
def appending(path: Path) -> Iterator[Callable[[bytes], None]]:
    """Creates or empties the file ``path``, and yields a function that appends one record.

    Guarantee:
        The operating system has each record when the function returns, so that another program
        can follow the file; a record that does not fit on the disk is removed completely.

    Raises:
        DiskFull: the disk has no room.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with disk_errors(path):
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        file = FileIO(open_regular(path, flags, what="the event file", mode=0o666), "wb")
    told = False

    def append(record: bytes) -> None:
        nonlocal told
        if not told and not _leads_to(path, file):
            told = True
            log.warning(
                "%s was removed or replaced while it was being written: later events are not in "
                "it. Check who has write access there; resuming the run writes the file again.",
                path,
            )
        end = file.tell()
        with disk_errors(path):
            try:
                written = 0
                while written < len(record):  # a disk that is filling up accepts only a part
                    written += file.write(record[written:])
            except OSError:
                file.truncate(end)
                file.seek(end)
                raise

    with file:
        yield append


def _leads_to(path: Path, file: FileIO) -> bool:
    """Returns whether the path still names the open file."""
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except OSError:
        return False
