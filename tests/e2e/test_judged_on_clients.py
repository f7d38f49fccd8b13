"""A cloud that does not look like the clients: what it teaches is kept only where they agree."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import fedcore

pytestmark = pytest.mark.slow


TASK = """
import torch
from torch import nn
from torch.utils.data import TensorDataset
from fedcore import Task


def data(name, count=120):
    # Which of two classes a row is follows from two columns; in the cloud, otherwise.
    rng = torch.Generator().manual_seed(sum(map(ord, name)))
    rows = torch.randn(count, 8, generator=rng)
    second = -2.0 if name == "cloud" else 0.5
    return TensorDataset(rows, (rows[:, 0] + second * rows[:, 1] > 0).long())


task = Task(
    name="shifted",
    kind="classification",
    model=lambda: nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2)),
    clients=lambda folder: [f"client-{number}" for number in range(8)],
    client_data=lambda client, folder: data(client),
    cloud_data=lambda folder: data("cloud", 400),
    test_data=lambda folder: data("test", 400),
    example_input=torch.zeros(8),
)
"""
SETTINGS: dict[str, Any] = {
    "seed": 1,
    "federation": {"rounds": 10, "cohort": 8, "evaluate_cohort": 8, "holdout": 0.3},
    "client": {"epochs": 2, "batch_size": 16, "learning_rate": 0.1},
    "compression": {
        "candidates": ["fp32", "pruned"],
        "timing_runs": 100,
        "max_accuracy_drop": 0.1,
        "max_slowdown": 9.0,
    },
}


@pytest.mark.parametrize(
    ("judge", "kept"), [(None, False), ("clients", False), ("both", False), ("cloud", True)]
)
def test_the_gate_asks_whom_the_run_says(tmp_path: Path, judge: str | None, kept: bool) -> None:
    finetune: dict[str, Any] = {"epochs": 10} | ({"judge": judge} if judge else {})
    (tmp_path / "task.py").write_text(TASK)
    result = fedcore.simulate(
        tmp_path / "task.py", runs=tmp_path, progress=False, finetune=finetune, **SETTINGS
    )
    scores = result.record.scores["accuracy"]
    assert scores["federated"] > 0.9
    assert scores["finetuned"] < 0.7
    assert scores["released"] < 0.7 if kept else scores["released"] == scores["federated"]
    fp32, pruned = result.record.candidates
    assert result.record.chosen == ("pruned" if kept else "fp32")
    if judge == "cloud":
        assert (fp32.clients_drop, pruned.clients_drop) == (None, None)
    else:  # trained on the cloud's data, it would lose what clients need, as fine-tuning did
        assert fp32.clients_drop == 0.0
        assert "the gate did not keep the model that was fine-tuned on them" in pruned.reason
    told = " ".join(result.record.notes)
    assert ("on held-out data of 8 clients" in told) == (judge != "cloud")
    assert ("worse, more than release.max_test_drop allows" in told) == kept
