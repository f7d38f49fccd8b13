from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedcore.config.owner import OPEN_POLICY, OwnerPolicy
from fedcore.config.run import RunConfig
from fedcore.errors import ConfigError
from server.rounds.checkpointing.run_identity import changes, check_same, identity_of


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "task.py").write_text("task = 1")
    (tmp_path / "devices.csv").write_text("client")
    return tmp_path


def made(folder: Path, owner: OwnerPolicy = OPEN_POLICY, **values: Any) -> dict[str, Any]:
    run = RunConfig.model_validate({"name": "run", "task": "task.py", "base": folder, **values})
    return identity_of(run, owner)


def test_the_same_run_is_the_same_wherever_it_lies(folder: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    moved.mkdir()
    (moved / "task.py").write_text("task = 1")
    assert changes(made(folder), made(moved)) == []


def test_what_differs_is_named_with_both_values(folder: Path) -> None:
    now = made(folder, OwnerPolicy(max_epsilon=1.0), seed=4, federation={"rounds": 3})
    assert changes(made(folder), now) == [
        "owner.max_epsilon (None then, 1.0 now)",
        "federation.rounds (10 then, 3 now)",
        "seed (0 then, 4 now)",
    ]


def test_files_are_told_apart_by_what_they_hold(folder: Path) -> None:
    traced = {"simulation": {"trace": "devices.csv"}}
    before = made(folder, **traced)
    (folder / "task.py").write_text("task = 2")
    (folder / "devices.csv").write_text("client,")
    assert changes(before, made(folder, **traced)) == ["the task file", "the trace"]


def test_workers_may_change(folder: Path) -> None:
    now = made(folder, simulation={"workers": 3, "engine": "ray"})
    assert changes(made(folder), now) == []
    check_same(folder, made(folder), now)


def test_a_setting_that_an_earlier_version_lacked_is_its_default(folder: Path) -> None:
    before = made(folder)
    del before["run"]["federation"]["max_update_norm"]
    assert changes(before, made(folder)) == []
    assert changes(before, made(folder, federation={"max_update_norm": 2.0})) == [
        "federation.max_update_norm (None then, 2.0 now)"
    ]


def test_another_run_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"seed \(0 then, 1 now\)"):
        check_same(folder / "checkpoint", made(folder), made(folder, seed=1))


def test_what_is_free_may_differ_and_nothing_else(folder: Path) -> None:
    before = made(folder)
    now = made(folder, finetune={"epochs": 3, "holdout": 0.2}, compression={"max_bytes": 10})
    free = ("compression.", "finetune.epochs")
    assert changes(before, now, free=free) == ["finetune.holdout (0.3 then, 0.2 now)"]
    check_same(folder, before, now, free=(*free, "finetune.holdout"))
