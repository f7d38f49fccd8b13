from __future__ import annotations

import io
import logging
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedcore.errors import ResourceError
from fedcore.observability.lines import KEPT, log_lines


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    logger = logging.getLogger("fedcore")
    before = (logger.level, logger.propagate, logger.handlers)
    yield
    for handler in logger.handlers:
        handler.close()
    logger.level, logger.propagate, logger.handlers = before


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
    with pytest.raises(ResourceError, match="cannot be written"):
        log_lines(tmp_path / "file" / "server.log")
