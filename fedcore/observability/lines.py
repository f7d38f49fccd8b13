"""One line an event in the log of a process that runs for months."""

from __future__ import annotations

import logging
import time
from typing import TextIO


def log_lines(stream: TextIO, *, level: int = logging.INFO) -> None:
    """Sends what fedcore logs to ``stream``, a line an event, with the time in UTC."""
    handler = logging.StreamHandler(stream)
    formatter = logging.Formatter("%(asctime)s.%(msecs)03dZ %(levelname)s %(message)s")
    formatter.datefmt = "%Y-%m-%dT%H:%M:%S"
    formatter.converter = time.gmtime
    handler.setFormatter(formatter)
    logger = logging.getLogger("fedcore")
    logger.setLevel(level)
    logger.propagate = False
    logger.handlers = [handler]
