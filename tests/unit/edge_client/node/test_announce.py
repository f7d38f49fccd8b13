from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from edge_client.node.announce import declared_name
from fedcore.errors import DataError


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("task = Task(name='digits', kind='x')", "digits"),
        ("import a\nraise SystemExit\ntask = fedcore.Task(kind='x', name='y')", "y"),
        ("NAME = 'z'\ntask = Task(name=NAME)", None),
        ("other = Task(name='digits')", None),
        ("task = make()", None),
        ("task = (", None),
        ("", None),
        ("\0", None),
    ],
)
def test_a_name_is_read_without_running_the_file(
    tmp_path: Path, text: str, name: str | None
) -> None:
    path = tmp_path / "task.py"
    path.write_text(text)
    assert declared_name(path) == name


def test_a_task_that_is_not_there_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the task does not exist"):
        declared_name(tmp_path / "task.py")


def test_announcing_imports_no_torch() -> None:
    code = "import sys, edge_client.node.announce, edge_client.node.policy, edge_client.node.state"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nprint('torch' in sys.modules)"],
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == "False", done.stderr
