"""Copies of runs in MLflow, read back by MLflow itself from its file store."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from fedcore.config.run import RunConfig
from fedcore.errors import ConfigError, DataError, ResourceError
from fedcore.files import sha256_hex
from fedcore.observability.events import RoundFinished, StageFinished, TrainingAdvanced
from server.report import mlflow_runs
from server.report.mlflow_runs import RUN_FILE, mlflow_run

Made = Callable[..., RunConfig]


@pytest.fixture
def make_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Made:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")

    def make(**tracking: Any) -> RunConfig:
        values = {"name": "churn", "task": "task.py", "seed": 7, "tracking": tracking}
        run = RunConfig.model_validate(values)
        return run.model_copy(update={"base": tmp_path})

    return make


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "runs").mkdir()
    return tmp_path / "runs"


def client(tmp_path: Path) -> Any:
    from mlflow.tracking import MlflowClient

    return MlflowClient(tracking_uri=(tmp_path / "kept").as_uri())


def runs_in(tmp_path: Path, experiment: str = "fedcore") -> list[Any]:
    found = client(tmp_path).get_experiment_by_name(experiment)
    return list(client(tmp_path).search_runs([found.experiment_id]))


def round_of(number: int, **metrics: float) -> RoundFinished:
    return RoundFinished({"round": number, "rounds": 9, "updates": 5, "metrics": metrics})


@contextmanager
def interrupted() -> Iterator[None]:
    yield
    raise KeyboardInterrupt


def test_settings_figures_and_digests_are_in_mlflow(
    make_run: Made, folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "task.py").write_text("task = None")
    run = make_run(mlflow="kept", experiment="trials")
    with mlflow_run(run, "simulation", folder) as sink:
        for number in (1, 2):
            sink(round_of(number, **{"top@3": number / 4, "undefined": float("nan")}))
        sink(TrainingAdvanced("finetuned", 40, 90, 0.25, 0.125, 8.0, None, None, 7.0))
        sink(StageFinished("finetune", 1.5, ""))
        (folder / "global.safetensors").write_bytes(b"weights")
        (folder / "candidates").mkdir()
        (folder / "candidates" / "fp32.onnx").write_bytes(b"onnx")
    (kept,) = runs_in(tmp_path, "trials")
    assert (kept.info.status, kept.info.run_name) == ("FINISHED", "churn")
    assert kept.data.params["seed"] == "7"
    assert kept.data.params["finetune.learning_rate"] == "0.05"
    assert kept.data.tags["sha256.global.safetensors"] == sha256_hex(b"weights")
    assert kept.data.tags["sha256.candidates/fp32.onnx"] == sha256_hex(b"onnx")
    assert kept.data.tags["fedcore.task_sha256"] == sha256_hex(b"task = None")
    assert kept.data.tags["fedcore.kind"] == "simulation"
    history = client(tmp_path).get_metric_history(kept.info.run_id, "metrics/top_3")
    assert [(each.step, each.value) for each in history] == [(1, 0.25), (2, 0.5)]
    (loss,) = client(tmp_path).get_metric_history(kept.info.run_id, "finetune/finetuned/loss")
    assert (loss.step, loss.value) == (40, 0.25)
    assert "metrics/undefined" not in kept.data.metrics


def test_a_resumed_run_continues_its_mlflow_run(
    make_run: Made, folder: Path, tmp_path: Path
) -> None:
    run = make_run(mlflow="kept")
    with (
        pytest.raises(KeyboardInterrupt),
        mlflow_run(run, "simulation", folder) as sink,
        interrupted(),
    ):
        sink(round_of(1, accuracy=0.5))
    (kept,) = runs_in(tmp_path)
    assert kept.info.status == "KILLED"
    with mlflow_run(run, "simulation", folder) as sink:
        sink(round_of(2, accuracy=0.75))
    (kept,) = runs_in(tmp_path)
    assert kept.info.status == "FINISHED"
    history = client(tmp_path).get_metric_history(kept.info.run_id, "metrics/accuracy")
    assert [each.step for each in history] == [1, 2]
    with pytest.raises(ZeroDivisionError), mlflow_run(run, "finetune", None):
        raise ZeroDivisionError
    assert sorted(each.info.status for each in runs_in(tmp_path)) == ["FAILED", "FINISHED"]


def test_a_run_goes_on_when_figures_cannot_be_sent(
    make_run: Made, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from mlflow.tracking import MlflowClient

    monkeypatch.setattr(mlflow_runs, "_EVERY_S", 0.01)
    monkeypatch.setattr(logging.getLogger("fedcore"), "propagate", True)
    with mlflow_run(make_run(mlflow="kept"), "server", folder) as sink:

        def lost(*arguments: Any, **more: Any) -> None:
            raise OSError("no route\x1b[31m")

        monkeypatch.setattr(MlflowClient, "log_batch", lost)
        sink(round_of(1, accuracy=0.5))
    said = [record.getMessage() for record in caplog.records if "MLflow" in record.getMessage()]
    assert len(said) == 2
    assert "no route\\x1b[31m" in said[0]
    assert "2 figures did not reach the tracking server" in said[1]


def test_nothing_is_sent_where_nothing_is_set(make_run: Made, folder: Path) -> None:
    with mlflow_run(make_run(), "simulation", folder) as sink:
        sink(round_of(1, accuracy=0.5))
    assert not list(folder.iterdir())


def test_without_mlflow_the_setting_is_refused(
    make_run: Made, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mlflow_runs, "find_spec", lambda name: None)
    with (
        pytest.raises(ConfigError, match=r"not installed.*pip install 'fedcore\[mlflow\]'"),
        mlflow_run(make_run(mlflow="kept"), "simulation", folder),
    ):
        pass


@pytest.mark.parametrize(
    ("uri", "error", "said"),
    [
        ("http://127.0.0.1:9", ResourceError, "does not answer"),
        ("nonsense://x", ConfigError, "MLflow refused it"),
    ],
)
def test_a_place_that_cannot_be_used_is_refused_before_the_run(
    make_run: Made, folder: Path, monkeypatch: pytest.MonkeyPatch,
    uri: str, error: type[Exception], said: str,
) -> None:  # fmt: skip
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(error, match=said), mlflow_run(make_run(mlflow=uri), "server", folder):
        pass
    assert not (folder / RUN_FILE).exists()


def test_a_password_in_the_run_file_is_refused(make_run: Made) -> None:
    with pytest.raises(ValueError, match="MLFLOW_TRACKING_PASSWORD") as refused:
        make_run(mlflow="https://anna:secret@example.org")
    assert "leave them out" in str(refused.value)


def test_a_damaged_name_of_the_mlflow_run_is_said(make_run: Made, folder: Path) -> None:
    (folder / RUN_FILE).write_text("[1]")
    with (
        pytest.raises(DataError, match="does not name an MLflow run"),
        mlflow_run(make_run(mlflow="kept"), "server", folder),
    ):
        pass
