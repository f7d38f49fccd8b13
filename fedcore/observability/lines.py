"""One line an event in the log of a process that runs for months."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import TextIO

from fedcore.files import disk_errors
from fedcore.observability.foreign import MOST_LINE_BYTES, bounded_line, foreign
from fedcore.observability.throttle import Throttle, left_out

MAX_BYTES, KEPT = 10 << 20, 5
"""A file of 10 MiB gives way to the next, and five old ones stay: 60 MiB at most."""


def log_lines(
    to: TextIO | Path,
    *,
    level: int = logging.INFO,
    max_bytes: int = MAX_BYTES,
    throttled: bool = False,
) -> None:
    """Sends what fedcore logs to a stream or a file, a line an event, with the time in UTC.

    A file that has grown to ``max_bytes`` is renamed to ``FILE.1``, which becomes ``FILE.2``, and
    so on; the oldest of more than `KEPT` goes. A full disk loses lines, and stops nothing.

    Where ``throttled``, few of the project's own lines of a kind are written, too (`Throttled`): on
    a device, whose every line its one server can cause.

    Raises:
        ResourceError: the file may not be written.
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
    # What libraries say of a peer (uvicorn, grpc, asyncio) would come on standard error by itself,
    # with a traceback each time.
    root = logging.getLogger()
    kept = [one for one in root.handlers if not isinstance(one, _Quiet)]
    root.handlers = [*kept, handler]
    logging.captureWarnings(True)


class OneLine(logging.Formatter):
    """Time in UTC, level and message on one line of less than 2 kB, whatever is in them.

    An exception that is logged is named, with its text and place; its traceback is left out. So
    nothing that a peer sends fills a log, or acts on the terminal of who reads it.
    """

    def format(self, record: logging.LogRecord) -> str:
        """The line; never raises."""
        try:
            message = record.getMessage()
        except Exception as error:  # arguments that do not fit, or that cannot be written
            message = (
                f"{record.msg!s:.200} (its arguments cannot be written: {type(error).__name__})"
            )
        if record.exc_info and record.exc_info[1] is not None:
            message = f"{foreign(message, _MESSAGE)} [{_named(record.exc_info[1])}]"
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line = f"{moment}.{int(record.msecs):03d}Z {record.levelname} {message}"
        more = left_out(getattr(record, _LEFT_OUT, 0))
        return bounded_line(line, MOST_LINE_BYTES - len(more)) + more


class Sparse(logging.Filter):
    """Lets few lines of libraries through: they say what a peer did as often as it does it.

    Of each logger some lines come at once, then one in a while. The project's own lines come all:
    those that a peer can cause are counted by peer where they are written.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Begins with nothing left out."""
        super().__init__()
        self._clock = clock
        self._left: dict[str, tuple[float, float]] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether a record is written."""
        if record.name.partition(".")[0] == "fedcore":
            return True
        now_s = self._clock()
        tokens, since_s = self._left.get(record.name, (_BURST, now_s))
        tokens = min(tokens + (now_s - since_s) / _AGAIN_S, _BURST)
        self._left[record.name] = (tokens - 1 if tokens >= 1 else tokens, now_s)
        return tokens >= 1


class Throttled(Sparse):
    """Lets few lines through of each kind, the project's own, too; the next one counts the others.

    A kind is a line's text before names and reasons are put into it. Warnings are as few as those
    of a peer on a server; what tells of work that goes on may come more often.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Begins with nothing left out."""
        super().__init__(clock)
        self._warnings: Throttle[str] = Throttle(clock=clock)
        self._news: Throttle[str] = Throttle(every_s=_NEWS_S, burst=_NEWS_BURST, clock=clock)

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether a record is written; notes on one that is how many were not."""
        if not super().filter(record):
            return False
        throttle = self._news if record.levelno < logging.WARNING else self._warnings
        silent = throttle.admit(str(record.msg))
        setattr(record, _LEFT_OUT, silent or 0)
        return silent is not None


_LEFT_OUT = "left_out"
_NEWS_S, _NEWS_BURST = 1.0, 300
_BURST, _AGAIN_S = 20.0, 10.0
_MESSAGE = 1000  # characters of a message beside which an exception is named


def _named(error: BaseException) -> str:
    """An exception on one line, with where it was raised."""
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    where = f" at {Path(frame.tb_frame.f_code.co_filename).name}:{frame.tb_lineno}" if frame else ""
    return f"{type(error).__name__}: {foreign(error)}{where}"


class _Quiet(logging.Handler):
    """Loses a line that cannot be written, on a full disk or to a reader that has gone."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's name
        """Says nothing: there is nowhere to say it."""


class _LineStream(_Quiet, logging.StreamHandler):  # type: ignore[type-arg]
    """Lines to a stream."""


class _Rotating(_Quiet, RotatingFileHandler):
    """Lines to a file, and to the next when it is full."""


def _file(path: Path, max_bytes: int) -> logging.Handler:
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o640)
        return _Rotating(path, maxBytes=max_bytes, backupCount=KEPT, encoding="utf-8")
