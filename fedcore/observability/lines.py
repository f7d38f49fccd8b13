"""Logging for long-running processes: one bounded line per event, rotation and throttling."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import TextIO

from fedcore.files import disk_errors
from fedcore.observability.foreign import MAX_LINE_BYTES, bounded_line, foreign
from fedcore.observability.throttle import DailyLines, Throttle, omitted_suffix

MAX_BYTES, KEPT = 10 << 20, 5
"""Size at which a log file is rotated, and old files kept: 60 MiB at most in total."""


def log_lines(
    to: TextIO | Path,
    *,
    level: int = logging.INFO,
    max_bytes: int = MAX_BYTES,
    throttled: bool = False,
) -> None:
    """Sends fedcore's log to a stream or a file, one line per event, with the time in UTC.

    A file of ``max_bytes`` is renamed to ``FILE.1``, which becomes ``FILE.2``, and so on; of more
    than `KEPT` old files the oldest is deleted. A full disk loses lines, but raises nothing.

    ``throttled`` also limits fedcore's own lines of each kind (`Throttled`). Set it on a device,
    whose server can cause all of its lines.

    Raises:
        ResourceError: the file is not writable.
    """
    handler: logging.Handler = _file(to, max_bytes) if isinstance(to, Path) else _LineStream(to)
    handler.setFormatter(OneLine())
    handler.addFilter(Throttled() if throttled else Sparse())
    logger = logging.getLogger("fedcore")
    logger.setLevel(level)
    for name in ("fedcore", "flwr"):
        named = logging.getLogger(name)
        named.propagate = False
        named.handlers = [handler]
    # Libraries (uvicorn, grpc, asyncio) would otherwise log a peer's errors to standard error,
    # with a traceback each time.
    root = logging.getLogger()
    kept = [one for one in root.handlers if not isinstance(one, _Quiet)]
    root.handlers = [*kept, handler]
    logging.captureWarnings(True)


class OneLine(logging.Formatter):
    """Formats time in UTC, level and message on one line of less than 2 kB, whatever they contain.

    A logged exception appears by name, text and place, without its traceback. So nothing that a
    peer sends can fill a log, or control the terminal of its reader.
    """

    def format(self, record: logging.LogRecord) -> str:
        """Returns the line; never raises."""
        try:
            message = record.getMessage()
        except Exception as error:  # arguments that do not match, or cannot be converted
            message = (
                f"{record.msg!s:.200} (its arguments cannot be formatted: {type(error).__name__})"
            )
        if record.exc_info and record.exc_info[1] is not None:
            message = f"{foreign(message, _MESSAGE)} [{_named(record.exc_info[1])}]"
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line = f"{moment}.{int(record.msecs):03d}Z {record.levelname} {message}"
        more = omitted_suffix(getattr(record, _LEFT_OUT, 0))
        return bounded_line(line, MAX_LINE_BYTES - len(more)) + more


class Sparse(logging.Filter):
    """Limits the log lines of libraries, which repeat as often as a peer causes them.

    Each logger may write some lines at once, then one in a while, and few in a day. fedcore's own
    lines all pass: the code that writes them limits those that a peer can cause.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Starts with full allowances."""
        super().__init__()
        self._libraries: Throttle[str] = Throttle(
            burst=_BURST, clock=clock, also=DailyLines[str](_LIBRARY_LINES, clock).admit
        )

    def filter(self, record: logging.LogRecord) -> bool:
        """Returns whether to write a record."""
        if record.name.partition(".")[0] == "fedcore":
            return True
        return self._libraries.admit(record.name) is not None


class Throttled(Sparse):
    """Limits the lines of each kind, also fedcore's own; later lines count those left out.

    A kind is a message's format string. Warnings have the limit that a server sets for one peer;
    lower levels, which report progress, have a higher one. All warnings together, and all other
    lines, are limited by day, so that a file's rotation does not soon drop what came before.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Starts with full allowances."""
        super().__init__(clock)
        warnings, news = (DailyLines[None](_OWN_LINES, clock) for _ in range(2))
        self._warnings: Throttle[str] = Throttle(
            clock=clock, also=lambda kind: warnings.admit(None)
        )
        self._news: Throttle[str] = Throttle(
            every_s=_NEWS_S, burst=_NEWS_BURST, clock=clock, also=lambda kind: news.admit(None)
        )

    def filter(self, record: logging.LogRecord) -> bool:
        """Returns whether to write a record, and notes on a written one how many were left out."""
        if not super().filter(record):
            return False
        throttle = self._news if record.levelno < logging.WARNING else self._warnings
        silent = throttle.admit(str(record.msg))
        setattr(record, _LEFT_OUT, silent or 0)
        return silent is not None


_LEFT_OUT = "left_out"
_NEWS_S, _NEWS_BURST = 1.0, 300
_OWN_LINES = 5000
"""Warnings of all kinds that are written at once, and in each day after that; also other lines."""
_BURST, _LIBRARY_LINES = 20, 500
_MESSAGE = 1000  # most characters of a message that is followed by an exception


def _named(error: BaseException) -> str:
    """Returns an exception on one line, with the place where it was raised."""
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    where = f" at {Path(frame.tb_frame.f_code.co_filename).name}:{frame.tb_lineno}" if frame else ""
    return f"{type(error).__name__}: {foreign(error)}{where}"


class _Quiet(logging.Handler):
    """A handler that drops a line it cannot write, to a full disk or a closed pipe."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's name
        """Ignores the error: there is no place to report it."""


class _LineStream(_Quiet, logging.StreamHandler):  # type: ignore[type-arg]
    """Writes lines to a stream."""


class _Rotating(_Quiet, RotatingFileHandler):
    """Writes lines to a file, and rotates it when it is full."""


def _file(path: Path, max_bytes: int) -> logging.Handler:
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o640)
        return _Rotating(path, maxBytes=max_bytes, backupCount=KEPT, encoding="utf-8")
