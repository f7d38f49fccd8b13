from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fedcore.errors import DataError
from fedcore.observability.events import (
    Noted,
    RoundFinished,
    StageAdvanced,
    StageFinished,
    StageStarted,
)
from fedcore.observability.jsonl import appending, json_lines

# Runs where files may hold 1000 bytes: the closest a test comes to a disk that fills up.
_FILLS_UP = """
import resource, signal, sys
from pathlib import Path
from fedcore.errors import DiskFull
from fedcore.observability.events import Noted
from fedcore.observability.jsonl import json_lines
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    with json_lines(Path(sys.argv[1])) as sink:
        for _ in range(100):
            sink(Noted("x" * 60))
except DiskFull as error:
    print(error)
"""


def test_lines_are_in_the_file_while_the_run_goes_on(
    tmp_path: Path, finished_round: Callable[[int], RoundFinished]
) -> None:
    path = tmp_path / "new" / "metrics.jsonl"
    with json_lines(path) as sink:
        sink(StageStarted("rounds", 5))
        sink(StageAdvanced("rounds", 1, ""))
        assert path.read_bytes() == b""
        sink(finished_round(1))
        assert json.loads(path.read_text())["round"] == 1
        sink(StageFinished("rounds", 1.0, ""))
        sink(Noted("done"))
    events = [json.loads(line)["event"] for line in path.read_text().splitlines()]
    assert events == ["round_finished", "stage_finished", "noted"]


def test_a_file_of_an_earlier_run_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("old\n")
    with json_lines(path) as sink:
        sink(Noted("new"))
    assert [json.loads(line)["text"] for line in path.read_text().splitlines()] == ["new"]


def test_a_line_that_does_not_fit_is_taken_back(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    done = subprocess.run(
        [sys.executable, "-c", _FILLS_UP, str(path)], capture_output=True, text=True, check=True
    )
    assert str(path) in done.stdout
    assert "no room" in done.stdout
    assert done.stderr == ""
    lines = path.read_text().splitlines(keepends=True)
    assert 5 < len(lines) < 100
    assert all(json.loads(line)["event"] == "noted" and line.endswith("\n") for line in lines)


@pytest.mark.parametrize("harm", ["removed", "replaced", "loop"])
def test_a_file_that_is_replaced_while_it_is_written_is_told_of_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, harm: str
) -> None:
    path = tmp_path / "lines"
    with appending(path) as append:
        append(b"one\n")
        path.unlink()
        if harm == "replaced":
            path.write_bytes(b"another's")
        elif harm == "loop":
            path.symlink_to(path.name)
        append(b"two\n")
        append(b"three\n")
    (line,) = caplog.messages
    assert "was removed or replaced while it was being written" in line


@pytest.mark.timeout(20)
def test_a_pipe_in_the_place_of_the_lines_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "lines")
    with pytest.raises(DataError), appending(tmp_path / "lines"):
        pytest.fail("it was opened")
