from __future__ import annotations

from pathlib import Path

import pytest

from fedcore.errors import TaskError
from server.live.inputs import load_named_task

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


def test_a_task_goes_by_the_name_that_its_file_says(tmp_path: Path) -> None:
    path = tmp_path / "task.py"
    path.write_text(_TASK.format(made="tiny", task="made"))
    assert load_named_task(path).name == "tiny"
    path.write_text(_TASK.format(made="tiny", task="(lambda name: made)(name='other')"))
    with pytest.raises(TaskError, match=r"name='other'.* name is 'tiny'"):
        load_named_task(path)
