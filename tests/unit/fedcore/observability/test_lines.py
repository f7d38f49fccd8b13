from __future__ import annotations

import io
import logging
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedcore.errors import ResourceError
from fedcore.observability.lines import KEPT, Sparse, Throttled, log_lines


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in ("fedcore", "flwr", None)]
    before = [(one, one.level, one.propagate, one.handlers) for one in loggers]
    yield
    for handler in logging.getLogger("fedcore").handlers:
        handler.close()
    logging.captureWarnings(False)
    for logger, level, propagate, handlers in before:
        logger.level, logger.propagate, logger.handlers = level, propagate, handlers


def test_a_line_an_event_with_the_time_in_utc() -> None:
    stream = io.StringIO()
    log_lines(stream)
    logging.getLogger("fedcore.server").info("device %s: left", "edge-1")
    line = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z INFO device edge-1: left\n"
    assert re.fullmatch(line, stream.getvalue())


def test_a_log_in_files_stays_within_its_bound(tmp_path: Path) -> None:
    path = tmp_path / "log" / "server.log"
    log_lines(path, max_bytes=2000)
    for number in range(1000):
        logging.getLogger("fedcore.server").info("event %d", number)
    files = sorted(path.parent.iterdir())
    assert len(files) == KEPT + 1
    assert sum(file.stat().st_size for file in files) <= 2000 * (KEPT + 1)
    assert path.read_text().endswith("event 999\n")


def test_a_log_goes_on_in_the_file_of_the_process_before(tmp_path: Path) -> None:
    path = tmp_path / "server.log"
    for word in ("first", "second"):
        log_lines(path)
        logging.getLogger("fedcore").warning(word)
    assert [line.split()[-1] for line in path.read_text().splitlines()] == ["first", "second"]


def test_a_place_where_no_file_can_be_is_said_so(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ResourceError, match="cannot write this file"):
        log_lines(tmp_path / "file" / "server.log")


def lines_of(stream: io.StringIO) -> list[str]:
    return stream.getvalue().splitlines()


NASTY = [
    "\x1b[31mred\x1b]0;title\x07",
    "two\nlines\r\nand\x85more\u2028still",
    "\ud800 half a pair \udfff",
    "\u202eturned",
    "x" * 100_000,
    "é" * 100_000,
    "\U000e0001" * 10_000,
    "%s %d %(no)s {}",
    "\x00\x7f\x9b",
]


@pytest.mark.parametrize("text", NASTY)
@pytest.mark.parametrize("name", ["fedcore.server", "uvicorn.error", "asyncio", "flwr"])
def test_whatever_is_logged_comes_as_one_short_line_that_can_be_printed(
    text: str, name: str
) -> None:
    stream = io.StringIO()
    log_lines(stream)
    logging.getLogger(name).error("peer %s", text)
    logging.getLogger(name).error(text)
    found = lines_of(stream)
    assert len(found) == 2
    for line in found:
        assert line.isprintable()
        assert len(line.encode()) < 2000


@pytest.mark.parametrize("text", NASTY)
def test_an_exception_is_named_with_its_place_and_without_its_traceback(text: str) -> None:
    stream = io.StringIO()
    log_lines(stream)
    try:
        raise ValueError(text)
    except ValueError:
        logging.getLogger("asyncio").exception("callback failed")
    (line,) = lines_of(stream)
    assert "callback failed [ValueError: " in line
    assert " at test_lines.py:" in line
    assert line.isprintable()
    assert len(line.encode()) < 2000


class Broken:
    def __str__(self) -> str:
        raise OSError("no text")


def test_what_cannot_be_written_is_said_so() -> None:
    stream = io.StringIO()
    log_lines(stream)
    logging.getLogger("fedcore").warning("a %d", "word")
    logging.getLogger("fedcore").warning("a %s", Broken())
    assert all("its arguments cannot be formatted" in line for line in lines_of(stream))
    assert len(lines_of(stream)) == 2


def test_a_log_whose_reader_has_gone_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    log_lines(Gone())
    logging.getLogger("fedcore").warning("nobody hears this")
    assert capsys.readouterr().err == ""


def test_what_libraries_say_comes_now_and_then_and_what_the_project_says_always() -> None:
    now = [0.0]
    sparse = Sparse(lambda: now[0])

    def passes(name: str) -> bool:
        record = logging.LogRecord(name, logging.ERROR, "", 0, "text", None, None)
        return bool(sparse.filter(record))

    assert sum(passes("uvicorn.error") for _ in range(1000)) == 20
    assert sum(passes("grpc") for _ in range(5)) == 5
    now[0] = 20.0
    assert sum(passes("uvicorn.error") for _ in range(1000)) == 2
    assert all(passes("fedcore.server") for _ in range(1000))


def test_a_device_writes_few_lines_of_a_kind_and_says_how_many_were_left_out() -> None:
    stream = io.StringIO()
    log_lines(stream, throttled=True)
    now = [0.0]
    (handler,) = logging.getLogger("fedcore").handlers
    handler.filters = [Throttled(lambda: now[0])]
    log = logging.getLogger("fedcore.device")
    for number in range(1000):
        log.warning("run %d: does not take part: %s", number, "x" * 3000)
        log.warning("not taken: %s", "once" if not number else "again")
        log.info("%s %s: done in %.2f s", "run", "train", 0.1)
    lines = lines_of(stream)
    assert sum("does not take part" in line for line in lines) == 20
    assert sum("not taken" in line for line in lines) == 20
    assert sum("done in" in line for line in lines) == 300
    now[0] = 10.0
    log.warning("run %d: does not take part: %s", 7, "x" * 3000)
    last = lines_of(stream)[-1]
    assert last.endswith("(980 more of these since the last one was logged)")
    assert len(last) < 2000


def test_what_is_left_out_is_bounded_in_kinds() -> None:
    throttled = Throttled(lambda: 0.0)
    written = 0
    for number in range(50_000):
        record = logging.LogRecord("fedcore", 30, "", 0, f"kind {number}", None, None)
        written += throttled.filter(record)
    assert written == 5000, "as many in all at once, and in each day after that"
    assert len(throttled._warnings._left) <= 10_000
