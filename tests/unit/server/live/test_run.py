"""What a server does before it has imported torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from fedcore.errors import TaskError
from server.live.run import _load

_TASK = """
import torch
from dataclasses import replace
from fedcore import Task

made = Task(
    name={made!r}, kind="classification", model=lambda: None, clients=lambda folder: [],
    client_data=None, test_data=None, example_input=torch.zeros(1),
)
task = {task}
"""


def test_a_server_listens_before_torch_is_imported() -> None:
    code = "import sys, server.live.commands, server.live.run"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nprint(*{{'torch', 'opacus'}} & sys.modules.keys())"],
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == "", done.stderr
    assert done.returncode == 0


def test_a_task_goes_by_the_name_that_its_file_says(tmp_path: Path) -> None:
    path = tmp_path / "task.py"
    path.write_text(_TASK.format(made="tiny", task="made"))
    assert _load(path).name == "tiny"
    path.write_text(_TASK.format(made="tiny", task="(lambda name: made)(name='other')"))
    with pytest.raises(TaskError, match=r"name='other'.* is called 'tiny'"):
        _load(path)
