"""A cloud whose data do not look like the devices' spoils no release."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

Fedcore = Callable[..., subprocess.CompletedProcess[str]]
TASK = """
import torch
from torch import nn
from torch.utils.data import TensorDataset
from fedcore import Task


def made(count, seed, turned=0):
    x = torch.randn(count, 8, generator=torch.Generator().manual_seed(seed))
    return TensorDataset(x, ((x[:, 0] > 0) + 2 * (x[:, 1] > 0) + turned) % 4)


task = Task(
    name="turned",
    kind="classification",
    model=lambda: nn.Linear(8, 4),
    clients=lambda folder: ["a", "b", "c"],
    client_data=lambda client, folder: made(200, ord(client)),
    cloud_data=lambda folder: made(200, 1, turned=1),
    test_data=lambda folder: made(400, 2),
    example_input=torch.zeros(8),
)
"""
RUN = """
name = "turned"
task = "task.py"
[federation]
rounds = 5
[client]
learning_rate = 0.5
[finetune]
epochs = 20
[compression]
candidates = ["fp32"]
timing_runs = 100
[release]
repository = "repository"
keys = "keys"
"""


@pytest.fixture
def folder(tmp_path: Path, fedcore: Fedcore) -> Path:
    (tmp_path / "task.py").write_text(TASK)
    (tmp_path / "run.toml").write_text(RUN)
    keys = ["--keys", "keys", "--repository", "repository"]
    assert fedcore("release", "init", *keys, cwd=tmp_path).returncode == 0
    return tmp_path


def test_what_the_final_test_shows_to_be_worse_is_withheld(folder: Path, fedcore: Fedcore) -> None:
    done = fedcore("simulate", "run.toml", cwd=folder)
    assert done.returncode == 9, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert "release.max_test_drop = 0.01" in done.stderr
    found = json.loads((folder / "runs/turned/summary.json").read_text())
    assert found["accuracy"]["released"] < found["accuracy"]["federated"] - 0.2
    assert found["release"]["version"] is None
    assert "Nothing was published" in found["release"]["withheld"]
    assert "Nothing was published" in (folder / "runs/turned/report.html").read_text()
    assert not list(folder.glob("repository/targets/**/manifest.json"))

    options = ["--fresh", "--set", "release.max_test_drop=1.0"]
    done = fedcore("simulate", "run.toml", *options, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    (manifest,) = folder.glob("repository/targets/**/*manifest.json")
    test = json.loads(manifest.read_text())["test"]
    assert (test["metric"], test["examples"]) == ("accuracy", 400)
    assert test["released"] < test["federated"] - 0.2

    done = fedcore("simulate", "run.toml", "--fresh", "--set", "finetune.epochs=0", cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
