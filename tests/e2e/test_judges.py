"""Clients that hold back all of their data in whole simulations: they judge, and never train."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import fedcore
from fedcore.errors import ConfigError

pytestmark = pytest.mark.slow

JUDGES = {"client-3", "client-6", "client-7"}  # by their names, of client-0 to client-7

TASK = """
import torch
from torch import nn
from torch.utils.data import TensorDataset
from fedcore import Task

JUDGES, SHIFT, WATCHED = {judges}, {shift}, {watched}


class Watched(nn.Module):
    # Fails on a row of a judge while it trains; the last column marks these rows.
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))

    def forward(self, x):
        if self.training and (x[:, 7] == 9).any():
            raise AssertionError("a row of a judge was trained on")
        return self.net(x)


def data(name, count=60):
    rng = torch.Generator().manual_seed(sum(map(ord, name)))
    rows = torch.randn(count, 8, generator=rng)
    targets = (rows[:, 0] + 0.5 * rows[:, 1] > 0).long()
    rows[:, 7] = 9.0 if name in JUDGES else 0.0
    if name in JUDGES and SHIFT:
        rows, targets = rows + SHIFT, 1 - targets
    return TensorDataset(rows, targets)


task = Task(
    name="judged",
    kind="classification",
    model=Watched if WATCHED else lambda: Watched().net,
    clients=lambda folder: [f"client-{{number}}" for number in range(8)],
    client_data=lambda client, folder: data(client),
    cloud_data=lambda folder: data("cloud", 200),
    test_data=lambda folder: data("test", 200),
    example_input=torch.zeros(8),
)
"""
APART = {"holdout": 0.45, "holdout_by": "clients", "evaluate_cohort": 8}


def simulated(
    folder: Path, *, shift: float = 0.0, watched: bool = True, resume: bool = False, **more: Any
) -> fedcore.Result:
    folder.mkdir(exist_ok=True)
    (folder / "task.py").write_text(TASK.format(judges=JUDGES, shift=shift, watched=watched))
    settings: dict[str, Any] = {
        "seed": 1,
        "federation": {"rounds": 3} | APART | more.pop("federation", {}),
        "client": {"batch_size": 16},
        "finetune": {"epochs": 2},
        "compression": {"candidates": ["fp32", "int8_dynamic"], "timing_runs": 100},
        "simulation": {"training": "loop", "workers": 1},
    }
    return fedcore.simulate(
        folder / "task.py", runs=folder, progress=False, resume=resume, **settings | more
    )


def losses(result: fedcore.Result) -> list[float | None]:
    return [each.train_loss for each in result.record.rounds]


def test_who_judges_never_trains_and_judges_every_model(tmp_path: Path) -> None:
    result = simulated(tmp_path)
    rounds = result.record.rounds
    assert [(one.cohort, one.updates, one.failed) for one in rounds] == [(5, 5, 0)] * 3
    assert [one.sources["accuracy"].clients for one in rounds] == [3, 3, 3]
    assert {one.client for one in result.record.clients}.isdisjoint(JUDGES)
    told = " ".join(result.record.notes)
    assert "on held-out data of 3 clients" in told
    assert result.record.candidates[0].clients_drop == 0.0
    text = (result.folder / "report.html").read_text()
    assert "on clients that never trained" in text
    assert "federation.holdout_by" in text
    found = fedcore.evaluate(
        tmp_path / "task.py",
        None,
        result.folder / "global.safetensors",
        federation={"rounds": 3} | APART,
        progress=False,
    )
    assert {one.client for one in found.clients} == JUDGES
    assert "180 examples of 3 of 3 clients" in str(found)


@pytest.mark.parametrize(
    ("training", "workers", "private"),
    [
        ("loop", 2, False),
        ("loop", 1, True),
        ("vectorised", 1, False),
        ("vectorised", 2, True),
    ],
)
def test_what_judges_hold_changes_no_bit_of_the_training(
    tmp_path: Path, training: str, workers: int, private: bool
) -> None:
    privacy = {"unit": "example", "target_delta": 1e-3, "evaluations": 9} if private else {}
    plain = {"normalisation": "task" if private else "federated", "cohort": 4}
    simulation = {"training": training, "workers": workers}
    more = {"privacy": privacy, "simulation": simulation, "federation": plain}
    more |= {"finetune": {"epochs": 0}, "compression": {"candidates": ["fp32"]}}
    one = simulated(tmp_path / "one", watched=False, **more)
    other = simulated(tmp_path / "other", watched=False, shift=5.0, **more)
    kept = [result.folder / "global.safetensors" for result in (one, other)]
    if private:  # rounds are judged by the cloud's data
        assert kept[0].read_bytes() == kept[1].read_bytes()
    else:
        assert one.record.rounds[-1].metrics != other.record.rounds[-1].metrics
        assert losses(one) == losses(other)
    assert None not in losses(one) or private


def test_a_run_is_resumed_with_the_same_judges_and_no_others(tmp_path: Path) -> None:
    rest: dict[str, Any] = {"finetune": {"epochs": 0}, "compression": {"candidates": ["fp32"]}}
    whole = simulated(tmp_path / "whole", federation={"rounds": 4}, **rest)
    simulated(tmp_path / "part", federation={"rounds": 2}, **rest)
    for changed in ({"holdout_by": "rows"}, {"holdout": 0.5}):
        with pytest.raises(ConfigError, match=rf"federation\.{next(iter(changed))} \("):
            simulated(tmp_path / "part", federation={"rounds": 4} | changed, resume=True, **rest)
    resumed = simulated(tmp_path / "part", federation={"rounds": 4}, resume=True, **rest)
    assert losses(resumed) == losses(whole)
    assert [one.metrics for one in resumed.record.rounds] == [
        one.metrics for one in whole.record.rounds
    ]


def test_too_few_judges_end_the_run_before_it_begins(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"1 of 8 clients hold back .* set holdout to 0\.15"):
        simulated(tmp_path, federation={"holdout": 0.1})
    assert {path.name for path in tmp_path.iterdir()} <= {"task.py", "__pycache__"}
