"""One line an event in the log of a process that runs for months."""

from __future__ import annotations

import logging
import time
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import TextIO

from fedcore.files import disk_errors

MAX_BYTES, KEPT = 10 << 20, 5
"""A file of 10 MiB gives way to the next, and five old ones stay: 60 MiB at most."""


def log_lines(to: TextIO | Path, *, level: int = logging.INFO, max_bytes: int = MAX_BYTES) -> None:
    """Sends what fedcore logs to a stream or a file, a line an event, with the time in UTC.

    A file that has grown to ``max_bytes`` is renamed to ``FILE.1``, which becomes ``FILE.2``, and
    so on; the oldest of more than `KEPT` goes. A full disk loses lines, and stops nothing.

    Raises:
        ResourceError: the file may not be written.
    """
    handler: logging.Handler = (
        _file(to, max_bytes) if isinstance(to, Path) else logging.StreamHandler(to)
    )
    formatter = logging.Formatter("%(asctime)s.%(msecs)03dZ %(levelname)s %(message)s")
    formatter.datefmt = "%Y-%m-%dT%H:%M:%S"
    formatter.converter = time.gmtime
    handler.setFormatter(formatter)
    logger = logging.getLogger("fedcore")
    logger.setLevel(level)
    logger.propagate = False
    logger.handlers = [handler]


def _file(path: Path, max_bytes: int) -> logging.Handler:
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o640)
        return RotatingFileHandler(path, maxBytes=max_bytes, backupCount=KEPT, encoding="utf-8")
