from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from fedcore.errors import ConfigError
from fedcore.task.definition import Examples, Task
from server import api


def task(name: str) -> Task:
    def none(*_: object) -> Examples:
        raise AssertionError("no data is read")

    return Task(
        name=name,
        kind="regression",
        model=lambda: nn.Linear(1, 1),
        clients=lambda folder: ["a"],
        client_data=none,
        test_data=none,
        example_input=torch.zeros(1),
    )


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("digits", "digits"),
        ("Ward-3.v2", "ward-3-v2"),
        ("_private", "private"),
        ("...", "run"),
        ("A" * 64, "a" * 64),
    ],
)
def test_a_run_is_named_after_its_task(name: str, expected: str) -> None:
    assert api._configured(task(name), None, {}).name == expected
    assert api._configured(Path("there") / f"{name}.py", None, {}).name == expected


def test_a_file_of_any_name_gives_a_run_one() -> None:
    assert api._configured("My täsk (final).py", None, {}).name == "my-t-sk-final-"
    assert api._configured("x" * 99 + ".py", None, {}).name == "x" * 64


def test_a_name_that_is_given_is_not_changed_but_refused() -> None:
    with pytest.raises(ConfigError, match="name"):
        api._configured(task("digits"), None, {"name": "My run"})


@pytest.mark.parametrize(("workers", "gpus"), [(0, 2), (2, 1)])
def test_a_task_made_in_memory_stays_in_this_process(
    monkeypatch: pytest.MonkeyPatch, workers: int, gpus: int
) -> None:
    monkeypatch.setattr(api, "available", lambda name: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    run = api._configured(task("digits"), None, {"simulation": {"workers": workers}})
    with (
        pytest.raises(ConfigError, match=rf"simulation\.workers = {workers} with {gpus} GPU"),
        api._loaded(task("digits"), run),
    ):
        pass
    alone = api._configured(task("digits"), None, {"simulation": {"workers": 1}})
    with api._loaded(task("digits"), alone) as (loaded, _):
        assert loaded.name == "digits"


def test_a_task_made_in_memory_has_a_file_meanwhile() -> None:
    run = api._configured(task("digits"), None, {})
    with api._loaded(task("digits"), run) as (_, configured):
        path = configured.path(configured.task)
        assert "'digits'" in path.read_text()
    assert not path.exists()
