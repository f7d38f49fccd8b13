"""Whoever listens, a run goes on: its results are files."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import pytest

from fedcore.errors import TaskError
from fedcore.observability.console import plain
from fedcore.observability.events import Noted
from fedcore.task.definition import load_task


class Closed(io.StringIO):
    def write(self, text: str) -> int:
        raise BrokenPipeError


def test_a_reader_that_leaves_does_not_end_the_run() -> None:
    with plain(Closed()) as sink:
        sink(Noted("one"))
        sink(Noted("two"))
    heard = io.StringIO()
    with plain(heard) as sink:
        sink(Noted("one"))
    assert "one" in heard.getvalue()


def test_a_command_works_with_its_output_closed(tmp_path: Path) -> None:
    command = f"{sys.executable} -m fedcore.cli new {tmp_path / 'x'} >&-"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "x" / "task.py").is_file()


def test_a_task_that_leaves_the_program_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "task.py"
    path.write_text("import sys\nsys.exit(0)\n")
    with pytest.raises(TaskError, match="SystemExit"):
        load_task(path)
