from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from fedcore.errors import DataError
from fedcore.metrics import ACCURACY, RMSE, Metric
from fedcore.training import evaluate as module
from fedcore.training.evaluate import evaluate, outputs_of

EYE: Any = TensorDataset(torch.eye(3).repeat(400, 1), torch.arange(3).repeat(400))


def test_metrics_are_over_all_examples_and_not_over_batches() -> None:
    seen: list[int] = []

    def count(outputs: torch.Tensor, targets: torch.Tensor) -> float:
        seen.append(len(outputs))
        return float(len(targets))

    assert len(EYE) > module.BATCH_SIZE
    scores = evaluate(nn.Identity(), EYE, (ACCURACY, Metric("count", count, True)))
    assert scores == {"accuracy": 1.0, "count": 1200.0}
    assert seen == [1200]


def test_a_regression_is_judged_too() -> None:
    data: Any = TensorDataset(torch.zeros(4, 1), torch.full((4,), 3.0))
    assert evaluate(nn.Identity(), data, (RMSE,)) == {"rmse": 3.0}


@pytest.mark.parametrize("training", [True, False])
def test_dropout_is_off_meanwhile_and_the_mode_is_left_as_it_was(training: bool) -> None:
    model = nn.Sequential(nn.Dropout(0.9)).train(training)
    outputs, _ = outputs_of(model, EYE)
    assert torch.equal(outputs, EYE.tensors[0])
    assert model.training is training


def test_no_examples_are_said_to_be_none() -> None:
    empty: Any = TensorDataset(torch.zeros(0, 3), torch.zeros(0))
    with pytest.raises(DataError, match="no examples to judge the model on"):
        evaluate(nn.Identity(), empty, (ACCURACY,))
