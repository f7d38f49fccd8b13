from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fedcore.config.settings import load_run
from fedcore.errors import ConfigError
from fedcore.task.definition import load_task
from fedcore.task.model import build_model, load_checkpoint
from tests.unit.server.finetune.conftest import command


def test_the_federated_model_is_trained_and_kept(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(folder, "--json") == 0
    *events, told = map(json.loads, capsys.readouterr().out.splitlines())
    last = [each for each in events if each["event"] == "training_advanced"][-1]
    assert (last["model"], last["done"]) == ("cloud_alone", last["steps"])
    board = EventAccumulator(str(folder / "runs" / "run" / "tensorboard" / "finetune"))
    board.Reload()
    (rate, *_) = board.Scalars("finetune/finetuned/learning_rate")
    assert rate.value == pytest.approx(0.05)
    out = folder / "runs" / "run" / "finetuned.safetensors"
    assert told["kept"]
    assert told["after"] > told["before"]
    assert told["file"] == str(out)
    model = build_model(load_task(folder / "task.py"), load_run(folder / "run.toml", []))
    load_checkpoint(out.read_bytes(), model, where="out")
    assert all(torch.isfinite(each).all() for each in model.parameters())
    assert not list((folder / "kept").rglob("step-*"))


def test_what_the_gate_refuses_is_not_written(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.finetune.launch.passes", lambda *measured: False)
    out = folder / "other.safetensors"
    start = folder / "runs" / "run" / "global.safetensors"
    assert command(folder, "--from", str(start), "--out", str(out)) == 0
    assert "The gate kept the model as it was." in capsys.readouterr().out
    assert not out.exists()


def test_one_node_has_nothing_to_join(folder: Path) -> None:
    with pytest.raises(ConfigError, match="there is nothing to join"):
        command(folder, "--join")
    with pytest.raises(ConfigError, match=r"needs finetune\.rendezvous"):
        command(folder, "--nnodes", "2", "--join")
