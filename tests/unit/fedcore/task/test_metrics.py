from __future__ import annotations

import math

import pytest
import torch

from fedcore.task.metrics import ACCURACY, MAE, PERPLEXITY, RMSE


def test_accuracy_is_the_share_of_rows_decided_right() -> None:
    outputs = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4], [0.7, 0.3]])
    assert ACCURACY.compute(outputs, torch.tensor([0, 1, 1, 0])) == 0.75


def test_accuracy_of_sequences_counts_tokens() -> None:
    outputs = torch.eye(3).expand(2, 3, 3)  # (B, T, V): token t at place t
    assert ACCURACY.compute(outputs, torch.tensor([[0, 1, 2], [0, 0, 0]])) == pytest.approx(4 / 6)


@pytest.mark.parametrize("shape", [(4,), (4, 1)])
def test_errors_of_a_regression(shape: tuple[int, ...]) -> None:
    outputs = torch.tensor([1.0, 2.0, 3.0, 4.0]).reshape(shape)
    targets = torch.tensor([1.0, 2.0, 3.0, 8.0])
    assert RMSE.compute(outputs, targets) == 2.0
    assert MAE.compute(outputs, targets) == 1.0


def test_perplexity_of_a_uniform_guess_is_the_size_of_the_vocabulary() -> None:
    targets = torch.tensor([[0, 1], [2, 3]])
    assert PERPLEXITY.compute(torch.zeros(2, 2, 16), targets) == pytest.approx(16)


def test_better_is_strict_and_follows_the_metric() -> None:
    assert ACCURACY.better(0.9, 0.8)
    assert not ACCURACY.better(0.8, 0.8)
    assert RMSE.better(1.0, 2.0)
    assert not RMSE.better(2.0, 2.0)
    assert not ACCURACY.better(math.nan, 0.1)
    assert not RMSE.better(math.nan, 9.0)


def test_worsening_is_absolute_for_a_score_and_relative_for_an_error() -> None:
    assert ACCURACY.worsening(0.90, 0.88) == pytest.approx(0.02)
    assert ACCURACY.worsening(0.88, 0.90) == pytest.approx(-0.02)
    assert RMSE.worsening(10.0, 12.0) == pytest.approx(0.2)
    assert RMSE.worsening(10.0, 9.0) == pytest.approx(-0.1)
    assert RMSE.worsening(0.0, 0.3) == 0.3
