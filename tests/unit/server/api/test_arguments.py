from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import nn

from fedcore.config.owner import OPEN_POLICY
from fedcore.config.run import IN_MEMORY
from fedcore.errors import ConfigError, DataError
from fedcore.task.definition import Examples, Task
from fedcore.task.model import build_model, checkpoint_bytes
from server.api import arguments
from server.rounds.checkpointing.run_identity import identity_of


def none(*_: object) -> Examples:
    raise AssertionError("no data is read")


def task(name: str) -> Task:
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
    assert arguments.configured(task(name), None, {}).name == expected
    assert arguments.configured(Path("there") / f"{name}.py", None, {}).name == expected


def test_a_file_of_any_name_gives_a_run_one() -> None:
    assert arguments.configured("My täsk (final).py", None, {}).name == "my-t-sk-final-"
    assert arguments.configured("x" * 99 + ".py", None, {}).name == "x" * 64


def test_a_name_that_is_given_is_not_changed_but_refused() -> None:
    with pytest.raises(ConfigError, match="name"):
        arguments.configured(task("digits"), None, {"name": "My run"})


@pytest.mark.parametrize(("workers", "gpus"), [(0, 2), (2, 1)])
def test_a_task_made_in_memory_stays_in_this_process(
    monkeypatch: pytest.MonkeyPatch, workers: int, gpus: int
) -> None:
    monkeypatch.setattr(arguments, "available", lambda name: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    made = task("digits")
    run = arguments.configured(made, None, {"simulation": {"workers": workers}})
    with pytest.raises(ConfigError, match=rf"simulation\.workers = {workers} with {gpus} GPU"):
        arguments.refuse_elsewhere(run, made, rounds=True)
    arguments.refuse_elsewhere(run, made, rounds=False)  # nobody is trained then
    alone = arguments.configured(made, None, {"simulation": {"workers": 1}})
    arguments.refuse_elsewhere(alone, made, rounds=True)
    from_file = arguments.configured("digits.py", None, {"simulation": {"workers": workers}})
    arguments.refuse_elsewhere(from_file, made, rounds=True)


def test_several_processes_of_fine_tuning_need_a_file() -> None:
    made = dataclasses.replace(task("digits"), cloud_data=lambda folder: none())
    run = arguments.configured(made, None, {"finetune": {"processes": 2}})
    for rounds in (True, False):
        with pytest.raises(ConfigError, match=r"finetune\.processes = 2.*was created in memory"):
            arguments.refuse_elsewhere(run, made, rounds=rounds)
    arguments.refuse_elsewhere(arguments.configured(made, None, {}), made, rounds=True)
    arguments.refuse_elsewhere(run, task("digits"), rounds=True)  # it has nothing to fine-tune on


def test_the_run_of_a_task_made_in_memory_is_the_same_in_every_process() -> None:
    made = task("digits")
    run = arguments.configured(made, None, {})
    assert arguments.configured(made, run, {}) == run
    assert identity_of(run, OPEN_POLICY)["run"]["task"] == IN_MEMORY
    assert arguments.loaded(made, run) is made
    with pytest.raises(ConfigError, match="pass that task along with the run"):
        arguments.loaded(None, run)


def test_a_run_names_its_task_where_none_is_given(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text('name = "x"\ntask = "mine.py"\n')
    run = arguments.configured(None, tmp_path / "run.toml", {"seed": 3})
    assert (run.task, run.seed, run.base) == ("mine.py", 3, tmp_path)
    with pytest.raises(ConfigError, match="expected a task or a run, got neither"):
        arguments.configured(None, None, {})


def test_a_model_is_given_or_read(tmp_path: Path) -> None:
    made = task("digits")
    run = arguments.configured(made, None, {})
    model = build_model(made, run)
    assert arguments.model_of(model, made, run) is model
    (tmp_path / "model.safetensors").write_bytes(checkpoint_bytes(model))
    read = arguments.model_of(tmp_path / "model.safetensors", made, run)
    assert checkpoint_bytes(read) == checkpoint_bytes(model)
    assert not read.training
    with pytest.raises(DataError, match=r"none\.safetensors"):
        arguments.model_of(tmp_path / "none.safetensors", made, run)
