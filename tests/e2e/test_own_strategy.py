"""A run with a strategy of the user's own: by command, interrupted, resumed, replayed, checked."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from fedcore import cli
from fedcore.errors import INTERRUPTED
from server.report.folder import CHECKPOINT
from server.rounds.cohort import select
from tests.contract.own_strategies import EXAMPLES

TASK = """
import torch
from torch import nn
from torch.utils.data import TensorDataset
from fedcore import Task

def data(name, folder):
    rng = torch.Generator().manual_seed(sum(map(ord, name)))
    targets = torch.randint(3, (20,), generator=rng)
    inputs = nn.functional.one_hot(targets, 5) + 0.3 * torch.randn(20, 5, generator=rng)
    return TensorDataset(inputs, targets)

task = Task(
    name="tiny",
    kind="classification",
    model=lambda: nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3)),
    clients=lambda folder: [f"client-{number}" for number in range(6)],
    client_data=data,
    test_data=lambda folder: data("test", folder),
    example_input=torch.zeros(5),
)
"""
RUN = """
name = "tiny"
task = "task.py"
seed = 3

[federation]
rounds = 6
cohort = 4
strategy = "mine.py:Stoppable"
strategy_options = { beta = 0.6 }

[client]
batch_size = 8

[compression]
candidates = ["fp32"]
timing_runs = 100

[simulation]
training = "WAY"
workers = 1
"""
STOPPABLE = """

import os
import signal


class Stoppable(SlowMomentum):
    \"\"\"SlowMo with a count of its own, which a test asks to press Ctrl-C in some round.\"\"\"

    def initial(self, weights):
        return super().initial(weights) | {"count": np.int64(0), "scale": 1.0, "word": "kept"}

    def configure(self, round, clients, state):
        settings = super().configure(round, clients, state)
        return {name: settings for name in clients if name != "client-2"}

    def step(self, round, weights, mean, state):
        made, kept = super().step(round, weights, mean, state)
        if os.environ.get("STOP_IN") == str(state["count"] + 1) == str(round.number):
            os.kill(os.getpid(), signal.SIGINT)
        scale = state["scale"] * 0.9
        return scale * made, {**state, **kept, "count": state["count"] + 1, "scale": scale}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "task.py").write_text(TASK)
    text = (EXAMPLES / "slow_momentum.py").read_text()
    (tmp_path / "mine.py").write_text(text + STOPPABLE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("FEDCORE_DATA", raising=False)
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("way", ["loop", "vectorised"])
def test_a_run_that_is_interrupted_goes_on_bit_for_bit(
    folder: Path, way: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "run.toml").write_text(RUN.replace("WAY", way))
    assert cli.main(["simulate", "run.toml", "--runs", "whole"]) == 0
    monkeypatch.setenv("STOP_IN", "4")  # the check before a run tries three rounds
    assert cli.main(["simulate", "run.toml", "--runs", "parts"]) == INTERRUPTED
    part = folder / "parts" / "tiny"
    assert (part / CHECKPOINT).is_file()
    mine = folder / "mine.py"
    shutil.copy(mine, "kept.py")
    mine.write_text(mine.read_text() + "# another\n")
    capsys.readouterr()
    assert cli.main(["simulate", "run.toml", "--runs", "parts", "--resume"]) == 2
    assert "differs in the strategy file" in capsys.readouterr().err
    shutil.copy("kept.py", mine)
    asked = select(range(6), 4, seed=3, words=("round", 5))
    again = ("--replay", f"5:client-{asked[0]}")
    assert cli.main(["simulate", "run.toml", "--runs", "parts", *again]) == 0
    assert cli.main(["simulate", "run.toml", "--runs", "parts", "--resume"]) == 0
    whole = (folder / "whole" / "tiny" / "global.safetensors").read_bytes()
    assert (part / "global.safetensors").read_bytes() == whole


def test_check_says_what_is_wrong_with_a_strategy(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "run.toml").write_text(RUN.replace("WAY", "loop"))
    assert cli.main(["check", "run.toml", "--json"]) == 0
    findings = json.loads(capsys.readouterr().out)["findings"]
    found = {one["step"]: one["detail"] for one in findings}
    assert found["strategy"] == "mine.py:Stoppable: folds updates"
    mine = folder / "mine.py"
    mine.write_text(mine.read_text().replace("return scale * made", "return made[1:]"))
    assert cli.main(["check", "run.toml"]) == 3
    said = capsys.readouterr().out
    assert "FAIL strategy" in said
    assert "step returned weights of shape (74,), expected (75,)" in said
