from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from fedcore.errors import DataError
from fedcore.task.metrics import ACCURACY, RMSE, Metric
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
    with pytest.raises(DataError, match="no examples to evaluate the model on"):
        evaluate(nn.Identity(), empty, (ACCURACY,))


class Seen(nn.Module):
    """A convolution that notes the memory in which it runs, behind which a batch is viewed."""

    def __init__(self, *, flat: bool) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 4, 3)
        self.flat = flat
        self.memory: set[bool] = set()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for tensor in (x, self.layer.weight):
            self.memory.add(tensor.is_contiguous(memory_format=torch.channels_last))
        found: torch.Tensor = self.layer(x)
        return found.view(len(x), -1) if self.flat else found


@pytest.mark.parametrize("flat", [True, False])
def test_convolutions_are_judged_in_the_memory_in_which_they_are_fastest(flat: bool) -> None:
    model = Seen(flat=flat)
    images = torch.randn(20, 3, 6, 5)
    with torch.no_grad():
        found = model.layer(images)
        expected = found.flatten(1) if flat else found
    data: Any = TensorDataset(images, torch.zeros(20))
    outputs, _ = outputs_of(model, data)
    assert model.memory == {True}
    assert torch.allclose(outputs, expected, atol=1e-6)
    assert outputs.is_contiguous()
    weight = model.layer.weight
    assert weight.is_contiguous()
    assert not weight.is_inference()  # it can be trained on
    model.layer(images).sum().backward()
    assert weight.grad is not None
