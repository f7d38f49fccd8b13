"""Whether a run over devices begins, goes on, goes on after its rounds, or is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedcore.config import RunConfig
from fedcore.errors import ConfigError
from server.live.resume import FOLDER, STEPS, open_run
from server.progress import Progress
from server.strategy_state import Remembered

RELEASE = {"release": {"repository": "releases", "keys": "keys"}}


def run_of(folder: Path, **more: Any) -> RunConfig:
    (folder / "task.py").write_text("task = 1")
    run = RunConfig.model_validate({"name": "orchard", "task": "task.py", **more})
    return run.model_copy(update={"base": folder})


def over(folder: Path, run: RunConfig) -> None:
    """Has the rounds of a run be over."""
    weights = np.zeros(3, np.float32)
    with open_run(run, folder / "runs", resume=False, fresh=True) as (_, journal):
        journal.commit(Progress(0, True, weights, weights, 0, 0, Remembered(None, ()), b""), None)
        journal.end()


def opened(folder: Path, run: RunConfig, *, resume: bool) -> bool:
    """Whether its rounds are over; steps that were begun are still there then."""
    with open_run(run, folder / "runs", resume=resume, fresh=False) as (results, journal):
        assert (results / FOLDER).is_dir()
        assert (results / STEPS).is_dir() == journal.ended
        return journal.ended


def begin_step(folder: Path) -> None:
    (folder / "runs" / "orchard" / STEPS).mkdir()


def complete(folder: Path) -> None:
    (folder / "runs" / "orchard" / "summary.json").write_text("{}")


def test_a_run_whose_rounds_are_over_goes_on_to_its_release(tmp_path: Path) -> None:
    run = run_of(tmp_path, **RELEASE)
    over(tmp_path, run)
    begin_step(tmp_path)
    with pytest.raises(ConfigError, match="go on with --resume, or begin anew with --fresh"):
        opened(tmp_path, run, resume=False)
    assert opened(tmp_path, run, resume=True)


def test_a_complete_run_is_not_resumed_and_may_be_run_again(tmp_path: Path) -> None:
    run = run_of(tmp_path, **RELEASE)
    over(tmp_path, run)
    complete(tmp_path)
    with pytest.raises(ConfigError, match=r"this run is complete: its results are in summary\.j"):
        opened(tmp_path, run, resume=True)
    assert not opened(tmp_path, run, resume=False)
    assert not (tmp_path / "runs" / "orchard" / "summary.json").exists()


def test_a_run_without_a_release_is_complete_with_its_rounds(tmp_path: Path) -> None:
    run = run_of(tmp_path)
    over(tmp_path, run)
    with pytest.raises(ConfigError, match=r"its model is in global\.safetensors"):
        opened(tmp_path, run, resume=True)
    begin_step(tmp_path)
    assert opened(tmp_path, run_of(tmp_path, **RELEASE), resume=True), "it may be released later"
    assert not opened(tmp_path, run, resume=False)


def test_what_comes_after_the_rounds_may_change_once_they_are_over(tmp_path: Path) -> None:
    over(tmp_path, run_of(tmp_path, **RELEASE))
    begin_step(tmp_path)
    lax = {"compression": {"max_accuracy_drop": 0.5}, "finetune": {"epochs": 3}}
    assert opened(tmp_path, run_of(tmp_path, **RELEASE, **lax), resume=True)
    for more in ({"seed": 3}, {"finetune": {"holdout": 0.5}}, {"federation": {"rounds": 11}}):
        with pytest.raises(ConfigError, match="was written by another run"):
            opened(tmp_path, run_of(tmp_path, **RELEASE, **more), resume=True)


def test_before_that_nothing_may_change(tmp_path: Path) -> None:
    run = run_of(tmp_path, **RELEASE)
    with open_run(run, tmp_path / "runs", resume=False, fresh=True):
        pass
    lax = run_of(tmp_path, **RELEASE, compression={"max_accuracy_drop": 0.5})
    with pytest.raises(ConfigError, match=r"compression\.max_accuracy_drop \(0\.01 then, 0\.5 now"):
        opened(tmp_path, lax, resume=True)
    assert not opened(tmp_path, run, resume=True)
