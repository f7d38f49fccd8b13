"""Whether the bound on a candidate's loss, the lowest of several, holds as often as it says."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

from fedcore import Task
from fedcore.artifacts.parity import FloatArray
from fedcore.config.run import Compression, RunConfig
from fedcore.task.measured import Measured
from server.cloud import CloudData
from server.compression.candidates import Built
from server.compression.confidence import confidence_of_each
from server.compression.evaluated import Evaluated, LossBounds
from server.rounds.evaluation.pooling import EvaluationAnswer

LIMIT = 0.1
"""The limit on the loss; asks for 100 inputs without labels."""
LOSS = 0.12
"""The true loss of the candidate, which answers wrongly below it; fp32 is always right."""


def wrong(inputs: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return inputs[:, 0] < LOSS


def outputs(onnx: bytes, inputs: np.ndarray[Any, Any]) -> FloatArray:
    """Decisions of the model: class 0, which is right, or class 1."""
    decided = wrong(inputs) if onnx == b"lossy" else np.zeros(len(inputs), bool)
    return np.eye(10, dtype=np.float32)[decided.astype(int)]


def evaluated(onnx: bytes, heldout: np.ndarray[Any, Any], clients: np.ndarray[Any, Any]) -> Any:
    built = Built(onnx=onnx, reference=torch.nn.Identity(), exact=True, calibration="none")
    right = [float((outputs(onnx, each)[:, 0] == 1).sum()) for each in clients]
    count = clients.shape[1]
    answers = {
        str(place): EvaluationAnswer(
            str(place), count, Measured(count, {"accuracy": np.array([each, count - each])})
        )
        for place, each in enumerate(right)
    }
    answer = outputs(onnx, heldout)
    return Evaluated(
        built=built,
        golden=answer,
        max_abs_error=0.0,
        heldout=answer,
        targets=torch.zeros(len(heldout), dtype=torch.int64),
        metric=float((answer[:, 0] == 1).mean()),
        clients=answers,
    )


def test_the_lowest_of_three_bounds_is_seldom_below_the_true_loss(
    digits: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In at most one of twenty draws; two standard errors of 200 draws leave room for chance."""
    monkeypatch.setattr("server.compression.evaluated.open_session", lambda onnx, threads: onnx)
    monkeypatch.setattr("server.compression.evaluated.answer", outputs)
    rng, draws, missed, asked = np.random.default_rng(0), 200, 0, 0
    run = RunConfig(name="run", task="t.py", compression=Compression(max_accuracy_drop=LIMIT))
    for _ in range(draws):
        heldout, train = rng.random((100, 1)), rng.random((100, 1))
        parts = (
            TensorDataset(torch.from_numpy(each), torch.zeros(100)) for each in (train, heldout)
        )
        clients = rng.random((20, 10, 1))
        base, lossy = (evaluated(onnx, heldout, clients) for onnx in (b"fp32", b"lossy"))
        bounds = LossBounds(run, digits, base, CloudData(*parts))
        found = bounds.of(lossy, base.metric - lossy.metric)
        missed += found.bound < LOSS
        asked += "without labels" in found.evidence
    assert asked  # all three take part
    assert missed <= 0.05 * draws + 2 * (0.05 * 0.95 * draws) ** 0.5


def test_bounds_that_are_combined_share_the_error() -> None:
    assert [confidence_of_each(count) for count in (1, 2, 3)] == pytest.approx(
        [0.95, 0.975, 1 - 0.05 / 3]
    )
