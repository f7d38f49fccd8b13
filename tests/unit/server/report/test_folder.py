from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from fedcore.config.run import RunConfig
from fedcore.errors import ConfigError, DiskFull, ResourceError
from server.live.resume import open_run
from server.records import Finished, RoundRecord, RunRecord
from server.report.folder import CHECKPOINT, clear, config_json, reopen_folder, write_results
from server.report.folder import open_folder as opening
from server.simulation.checkpoint import Checkpoint, write_checkpoint
from server.simulation.virtual.state import SimulationState
from server.unfinished import require_no_progress
from tests.unit.server.simulation.test_checkpoint import PROGRESS

RUN = RunConfig(name="demo", task="task.py", seed=7)


def open_folder(run: RunConfig, runs: Path) -> Path:
    """As a run that has ended left it."""
    with opening(run, runs) as folder:
        return folder


FINISHED = Finished(
    RunRecord(
        name="demo",
        task="tiny",
        kind="classification",
        primary="accuracy",
        higher_is_better=True,
        device="cpu",
        noise="none",
        rounds=(RoundRecord(1, 1, 0.1, 2, 2, 0, 0, 0.5, {"accuracy": 0.5}, "cloud", None, 10, 20),),
        best_round=1,
        scores={"accuracy": {"federated": 0.5, "released": 0.5}},
        stages={"federate": 0.1},
    ),
    torch_p50_us=12.5,
)


def test_a_folder_is_made_and_marked_with_the_configuration(tmp_path: Path) -> None:
    folder = open_folder(RUN, tmp_path / "runs")
    assert folder == tmp_path / "runs" / "demo"
    assert [path.name for path in folder.iterdir()] == ["run.json"]
    assert json.loads((folder / "run.json").read_text())["seed"] == 7


def test_the_configuration_is_read_back_as_it_was() -> None:
    assert RunConfig.model_validate_json(config_json(RUN)) == RUN


def test_the_results_of_the_run_before_are_replaced(tmp_path: Path) -> None:
    folder = open_folder(RUN, tmp_path)
    (folder / "summary.json").write_text("{}")
    (folder / "candidates").mkdir()
    (folder / "candidates" / "fp32.onnx").write_bytes(b"old")
    assert [path.name for path in open_folder(RUN, tmp_path).iterdir()] == ["run.json"]


def test_an_empty_folder_is_taken(tmp_path: Path) -> None:
    (tmp_path / "demo").mkdir()
    assert (open_folder(RUN, tmp_path) / "run.json").is_file()


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError, match=r"demo: this folder was not written by a run"):
        open_folder(RUN, tmp_path)
    assert (tmp_path / "demo" / "thesis.tex").read_text() == "years of work"


def test_a_file_in_the_way_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "demo").write_text("mine")
    with pytest.raises(ConfigError, match="was not written by a run"):
        open_folder(RUN, tmp_path)
    (tmp_path / "runs").write_text("mine, too")
    with pytest.raises(ResourceError, match="cannot write this file"):
        open_folder(RUN, tmp_path / "runs")
    assert (tmp_path / "demo").read_text() == "mine"


def test_what_a_killed_run_left_half_written_goes_when_the_next_one_starts(tmp_path: Path) -> None:
    folder = open_folder(RUN, tmp_path)
    (folder / "journal").mkdir()
    for place in (folder, folder / "journal"):
        (place / ".head.json.abcdefgh").write_bytes(b"half")
    with reopen_folder(RUN, tmp_path):
        assert sorted(path.name for path in folder.rglob("*")) == ["journal", "run.json"]


def test_a_run_that_was_killed_before_its_folder_was_marked_starts_again(tmp_path: Path) -> None:
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / ".run.json.abcdefgh").touch()
    assert [path.name for path in open_folder(RUN, tmp_path).iterdir()] == ["run.json"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / ".notes.original").touch()
    with pytest.raises(ConfigError, match="was not written by a run"):
        open_folder(RUN.model_copy(update={"name": "mine"}), tmp_path)
    assert (tmp_path / "mine" / ".notes.original").exists()


def test_results_are_the_report_and_the_summary(tmp_path: Path) -> None:
    figures = write_results(tmp_path, FINISHED, target_delta=None, seconds=3.5)
    assert json.loads((tmp_path / "summary.json").read_text()) == figures
    assert figures["accuracy"]["released"] == 0.5
    assert figures["seconds"]["total"] == 3.5
    assert "<html" in (tmp_path / "report.html").read_text()


def test_without_room_for_the_report_there_is_no_summary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, data: bytes) -> None:
        raise DiskFull(f"{path}: the disk has no room for this file.")

    monkeypatch.setattr("server.report.folder.write_atomic", full)
    with pytest.raises(DiskFull):
        write_results(tmp_path, FINISHED, target_delta=None, seconds=3.5)
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_did_not_end_is_reopened_as_it_was_left(tmp_path: Path) -> None:
    folder = open_folder(RUN, tmp_path)
    (folder / "metrics.jsonl").write_text("{}")
    with reopen_folder(RUN, tmp_path) as again:
        assert again == folder
        assert (folder / "metrics.jsonl").read_text() == "{}"
        with pytest.raises(ConfigError, match="a run of this name is in progress"):
            open_folder(RUN, tmp_path)


def test_there_must_be_a_run_to_reopen(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="none to resume"), reopen_folder(RUN, tmp_path):
        pass
    folder = open_folder(RUN, tmp_path)
    (folder / "run.json").rename(folder / "kept")
    with pytest.raises(ConfigError, match="restore that file"), reopen_folder(RUN, tmp_path):
        pass
    (folder / "kept").rename(folder / "run.json")


def test_what_is_kept_is_named(tmp_path: Path) -> None:
    folder = open_folder(RUN, tmp_path)
    for name in ("checkpoint", ".checkpoint.half", "metrics.jsonl"):
        (folder / name).write_text("")
    clear(folder, keep=["checkpoint"])
    assert {path.name for path in folder.iterdir()} == {"run.json", "checkpoint"}


def test_a_run_of_the_same_name_that_is_going_on_is_left_alone(tmp_path: Path) -> None:
    with opening(RUN, tmp_path) as folder:
        (folder / "metrics.jsonl").write_text("{}")
        with pytest.raises(ConfigError, match="a run of this name is in progress"):
            open_folder(RUN, tmp_path)
        assert (folder / "metrics.jsonl").exists()
    assert not (open_folder(RUN, tmp_path) / "metrics.jsonl").exists()


def interrupted(folder: Path, number: int) -> None:
    made = Checkpoint({}, replace(PROGRESS, round=number), (), SimulationState({}, Counter()), 1.0)
    write_checkpoint(folder / CHECKPOINT, made)


def test_what_an_interrupted_simulation_has_learnt_is_not_dropped(tmp_path: Path) -> None:
    folder = open_folder(RUN, tmp_path)
    interrupted(folder, 3)
    (tmp_path / "task.py").write_text("")
    run = RUN.model_copy(update={"base": tmp_path})
    with (
        pytest.raises(ConfigError, match=r"interrupted after round 3.*--resume.*--fresh"),
        opening(RUN, tmp_path, before=require_no_progress),
    ):
        pass
    assert (folder / CHECKPOINT).is_file()
    with (
        pytest.raises(ConfigError, match=r"after round 3"),
        open_run(run, tmp_path, resume=False, fresh=False),
    ):
        pass
    with open_run(run, tmp_path, resume=False, fresh=True):
        assert not (folder / CHECKPOINT).exists()
    with (
        pytest.raises(ConfigError, match=r"`fedcore server start` started this run over devices"),
        opening(RUN, tmp_path, before=require_no_progress),
    ):
        pass


def test_a_simulation_that_has_learnt_nothing_is_replaced(tmp_path: Path) -> None:
    folder = open_folder(RUN, tmp_path)
    interrupted(folder, 0)
    with opening(RUN, tmp_path, before=require_no_progress):
        assert not (folder / CHECKPOINT).exists()


def test_a_run_that_fails_before_its_first_checkpoint_replaces_nothing(tmp_path: Path) -> None:
    folder = open_folder(RUN, tmp_path)
    (folder / "candidates").mkdir()
    (folder / "candidates" / "fp32.onnx").write_bytes(b"old")
    write_results(folder, FINISHED, target_delta=None, seconds=3.5)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    def fails(stopped: BaseException) -> None:
        with opening(RUN.model_copy(update={"seed": 8}), tmp_path):
            assert json.loads((folder / "run.json").read_text())["seed"] == 8
            assert not (folder / "summary.json").exists()
            (folder / "metrics.jsonl").write_text("{}")
            raise stopped

    for stopped in (ConfigError("cannot train"), KeyboardInterrupt()):
        with pytest.raises(type(stopped)):
            fails(stopped)
        assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_a_run_with_progress_replaces_the_one_before(tmp_path: Path) -> None:
    folder = open_folder(RUN, tmp_path)
    write_results(folder, FINISHED, target_delta=None, seconds=3.5)

    def fails() -> None:
        with opening(RUN, tmp_path):
            (folder / CHECKPOINT).write_bytes(b"progress")
            raise ConfigError("stopped")

    with pytest.raises(ConfigError, match="stopped"):
        fails()
    assert {path.name for path in folder.iterdir()} == {"run.json", CHECKPOINT}


def test_what_a_killed_process_had_set_aside_is_found_again(tmp_path: Path) -> None:
    folder = open_folder(RUN, tmp_path)
    (folder / ".replaced").mkdir()
    (folder / ".replaced" / "summary.json").write_text("{}")
    (folder / "metrics.jsonl").write_text("{}")
    with (
        pytest.raises(ConfigError, match="this run is complete"),
        opening(RUN, tmp_path, before=require_no_progress),
    ):
        pass
    assert {path.name for path in folder.iterdir()} == {"run.json", "summary.json"}


def test_a_complete_run_is_replaced_only_when_that_is_asked_for(tmp_path: Path) -> None:
    folder = open_folder(RUN, tmp_path)
    write_results(folder, FINISHED, target_delta=None, seconds=3.5)
    with pytest.raises(ConfigError, match=r"would replace its model and results\. .*--fresh"):
        require_no_progress(folder)
    assert (folder / "summary.json").is_file()


def test_a_run_that_could_not_be_released_has_results_and_can_be_resumed(tmp_path: Path) -> None:
    folder = open_folder(RUN, tmp_path)
    failed = replace(FINISHED, record=replace(FINISHED.record, unreleased="the disk is full."))
    figures = write_results(folder, failed, target_delta=None, seconds=3.5)
    assert figures["release"]["failed"] == "the disk is full."
    assert "The release failed. the disk is full." in (folder / "report.html").read_text()
    with reopen_folder(RUN, tmp_path):
        pass
