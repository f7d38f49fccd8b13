"""Runs in a folder of results, and their differences."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from fedcore.cli import Command
from fedcore.config.run import RunConfig
from fedcore.errors import ConfigError, DataError
from server.commands.runs_command import runs as command
from server.report.compared import compare_runs, list_runs, read_run
from server.report.folder import config_json


def make_run(runs: Path, name: str, summary: dict[str, Any] | None = None, **settings: Any) -> Path:
    folder = runs / name
    folder.mkdir()
    run = RunConfig.model_validate({"name": name, "task": "task.py"} | settings)
    (folder / "run.json").write_bytes(config_json(run))
    if summary is not None:
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def figures(score: float, seconds: float = 9.0) -> dict[str, Any]:
    return {
        "rounds": 10,
        "accuracy": {"federated": score, "released": None},
        "auc": {"federated": 0.7, "released": 0.8},
        "epsilon": {"max": None},
        "seconds": {"rounds": 2.0, "total": seconds},
        "clients": [{"client": "anna", "metric": 0.5}],
    }


def call(*words: str) -> int:
    parser = argparse.ArgumentParser()
    assert isinstance(command, Command)
    command.arguments(parser)
    return command.run(parser.parse_args(words))


def test_a_servers_run_is_complete_with_its_last_step(tmp_path: Path) -> None:
    (make_run(tmp_path, "live") / "journal").mkdir()
    releasing = make_run(tmp_path, "releasing", release={"repository": "r", "keys": "k"})
    for folder in (make_run(tmp_path, "served"), releasing):
        (folder / "journal").mkdir()
        (folder / "global.safetensors").write_bytes(b"")
    assert {one.name: one.state for one in list_runs(tmp_path)} == {
        "live": "unfinished",
        "served": "complete",
        "releasing": "unfinished",
    }


def test_runs_are_listed_with_their_state_and_figures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(tmp_path, "done", figures(0.9))
    (make_run(tmp_path, "stopped") / "checkpoint.safetensors").write_bytes(b"")
    make_run(tmp_path, "begun")
    (tmp_path / "other").mkdir()
    assert {one.name: one.state for one in list_runs(tmp_path)} == {
        "done": "complete",
        "stopped": "unfinished",
        "begun": "begun",
    }
    assert call("list", "--runs", str(tmp_path)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    (row,) = (line for line in lines if line.startswith("done"))
    assert row.split()[1:5] == ["complete", "10", "accuracy.federated", "0.9000"]
    call("list", "--runs", str(tmp_path), "--json")
    listed = {one["name"]: one for one in json.loads(capsys.readouterr().out)}
    assert listed["done"]["figures"]["accuracy.federated"] == 0.9
    assert listed["begun"]["rounds"] is None


def test_two_runs_differ_in_settings_and_figures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(tmp_path, "a", figures(0.75))
    schedule = {"learning_rate": "cosine"}
    make_run(tmp_path, "b", figures(0.875), client={"epochs": 3, "schedule": schedule})
    found = compare_runs("a", "b", runs=tmp_path)
    assert found == compare_runs(read_run(tmp_path / "a"), tmp_path / "b", runs=tmp_path / "none")
    assert found.settings["client.epochs"] == (1, 3)
    assert found.settings["client.schedule.learning_rate.kind"] == (None, "cosine")
    assert "client.batch_size" not in found.settings
    assert "name" not in found.settings
    assert found.figures == {
        "rounds": (10, 10),
        "accuracy.federated": (0.75, 0.875),
        "auc.federated": (0.7, 0.7),
        "auc.released": (0.8, 0.8),
        "seconds.total": (9.0, 9.0),
    }
    assert call("compare", "a", str(tmp_path / "b"), "--runs", str(tmp_path)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert ["client.epochs", "1", "3"] in [line.split() for line in lines]
    assert ["accuracy.federated", "0.7500", "0.8750", "+0.125"] in [line.split() for line in lines]
    call("compare", "a", "b", "--runs", str(tmp_path), "--json")
    said = json.loads(capsys.readouterr().out)
    assert said["runs"] == ["a", "b"]
    assert said["settings"]["client.epochs"] == [1, 3]
    assert said["figures"]["accuracy.federated"] == [0.75, 0.875]


def test_equal_runs_say_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in "ab":
        make_run(tmp_path, name)
    call("compare", "a", "b", "--runs", str(tmp_path))
    said = capsys.readouterr().out
    assert said == "Both runs have the same settings.\n\nNeither run is complete.\n"


def test_what_is_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nobody: it has no run.json"):
        call("compare", "nobody", "nobody", "--runs", str(tmp_path))
    with pytest.raises(ConfigError, match="there is no such folder"):
        list_runs(tmp_path / "none")
    (make_run(tmp_path, "broken") / "summary.json").write_text("[]")
    with pytest.raises(DataError, match=r"broken/summary.json: not the file that a run writes"):
        list_runs(tmp_path)


@pytest.mark.parametrize(
    ("other", "same"),
    [
        ({"name": "digits", "kind": "classification", "sha256": "a" * 64}, True),
        ({"name": "digits", "kind": "classification", "sha256": "b" * 64}, False),
        ({"name": "sums", "kind": "regression", "sha256": "a" * 64}, False),
        (None, None),
    ],
)
def test_runs_of_two_tasks_are_said_to_be(
    other: dict[str, Any] | None,
    same: bool | None,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    task = {"name": "digits", "kind": "classification", "sha256": "a" * 64}
    make_run(tmp_path, "one", figures(0.9) | {"task": task})
    make_run(tmp_path, "other", figures(0.9) | {"task": other})
    assert compare_runs(read_run(tmp_path / "one"), read_run(tmp_path / "other")).same_task is same
    assert call("compare", "one", "other", "--runs", str(tmp_path)) == 0
    assert ("The tasks differ" in capsys.readouterr().out) == (same is False)
    assert call("compare", "one", "other", "--runs", str(tmp_path), "--json") == 0
    assert json.loads(capsys.readouterr().out)["same_task"] is same
