from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from fedcore.task.metrics import ACCURACY, PERPLEXITY, RMSE
from server.compression.confidence import (
    changed_decisions,
    disagreement_bound,
    is_accuracy,
    loss_bound,
    probe_count,
    probe_inputs,
)


def decisions(classes: Tensor) -> np.ndarray:
    return torch.nn.functional.one_hot(classes, 3).float().numpy()


def bound(count: int, worse: int = 0, better: int = 0) -> float:
    """The bound for so many examples, of which fp32 has the first few wrong."""
    targets = torch.zeros(count, dtype=torch.int64)
    before, after = targets.clone(), targets.clone()
    before[:better] = 1
    after[better : better + worse] = 1
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    reference, candidate = decisions(before[order]), decisions(after[order])
    return loss_bound(ACCURACY, "label", reference, candidate, targets)


def test_few_examples_without_a_change_prove_no_loss_of_nothing() -> None:
    assert bound(20) > 0.1
    assert bound(200) > 0.01
    assert bound(300) < 0.01
    assert bound(5000) < 0.001


def test_losses_widen_the_bound_and_gains_narrow_it() -> None:
    assert bound(500, worse=2) > 0.004 + bound(500) / 2
    assert bound(500, worse=2, better=2) > bound(500)
    assert bound(500, better=5) < bound(500)


@pytest.mark.parametrize("loss", [0.013, 0.03])
def test_a_candidate_that_loses_more_than_the_limit_is_seldom_admitted(loss: float) -> None:
    """Coverage: of 400 draws, at most one in twenty has a bound below the true loss."""
    rng, missed = np.random.default_rng(0), 0
    for _ in range(400):
        worse, better = rng.multinomial(300, [loss + 0.01, 0.01, 0.98 - loss])[:2]
        missed += bound(300, int(worse), int(better)) <= loss
    assert missed <= 0.05 * 400 + 2 * (0.05 * 0.95 * 400) ** 0.5


def test_one_example_bounds_nothing() -> None:
    assert bound(1) == np.inf


def test_any_metric_has_a_bound() -> None:
    rng = torch.Generator().manual_seed(0)
    targets = torch.randn(200, 1, generator=rng)
    reference = targets + 0.5 * torch.randn(200, 1, generator=rng)
    near, far = (reference + size * torch.randn(200, 1, generator=rng) for size in (0.01, 0.3))
    close, wide = (
        loss_bound(RMSE, "values", reference.numpy(), other.numpy(), targets)
        for other in (near, far)
    )
    assert 0 < close < 0.01 < 0.1 < wide
    tokens = torch.randint(3, (40, 5), generator=rng)
    logits = torch.randn(40, 5, 3, generator=rng)
    moved = logits + 0.01 * torch.randn(40, 5, 3, generator=rng)
    found = loss_bound(PERPLEXITY, "tokens", logits.numpy(), moved.numpy(), tokens)
    assert 0 < found < 0.02


def test_a_metric_that_a_part_of_the_data_has_no_value_of_bounds_nothing() -> None:
    odd = replace(ACCURACY, compute=lambda outputs, targets: float("nan"))
    outputs, targets = decisions(torch.zeros(30, dtype=torch.int64)), torch.zeros(30)
    assert loss_bound(odd, "label", outputs, outputs, targets) == np.inf


def test_changed_decisions_bound_the_loss() -> None:
    assert disagreement_bound(np.zeros(300)) == pytest.approx(1 - 0.05 ** (1 / 300))
    some = np.zeros(1000)
    some[:4] = 1
    assert 0.004 < disagreement_bound(some) < 0.01
    assert disagreement_bound(np.ones(5)) == 1
    one, other = decisions(torch.tensor([0, 1, 2])), decisions(torch.tensor([0, 1, 1]))
    assert changed_decisions(one, other, "label").tolist() == [0, 0, 1]
    tokens = np.stack([one, other])
    assert changed_decisions(tokens, tokens[::-1].copy(), "tokens").tolist() == pytest.approx(
        [1 / 3] * 2
    )


def test_the_share_of_right_decisions_is_told_from_other_metrics() -> None:
    targets = torch.tensor([0, 0, 0, 1])
    outputs = decisions(torch.tensor([0, 0, 1, 1]))
    assert is_accuracy(0.75, "label", outputs, targets)
    assert not is_accuracy(5 / 6, "label", outputs, targets)  # the mean over classes
    assert is_accuracy(0.5, "binary", np.array([[1], [-1]], np.float32), torch.tensor([1, 1]))
    assert not is_accuracy(0.75, "values", outputs, targets)


def test_a_tight_limit_needs_more_probes() -> None:
    assert [probe_count(limit) for limit in (0.0, 0.001, 0.01, 0.05, 1.0)] == [
        1000,
        1000,
        1000,
        200,
        100,
    ]


def test_probes_are_real_inputs_or_lie_between_two() -> None:
    inputs = torch.randn(50, 4, generator=torch.Generator().manual_seed(0)).double()
    examples = TensorDataset(inputs, torch.zeros(50))
    few = torch.from_numpy(probe_inputs(examples, count=20, seed=0))
    assert torch.cdist(few, inputs).amin(dim=1).max() < 1e-6
    many = probe_inputs(examples, count=200, seed=0)
    assert many.shape == (200, 4)
    assert (many >= inputs.amin(0).numpy() - 1e-9).all()
    assert (many <= inputs.amax(0).numpy() + 1e-9).all()
    assert np.array_equal(many, probe_inputs(examples, count=200, seed=0))
    assert not np.array_equal(many, probe_inputs(examples, count=200, seed=1))


def test_integers_are_spliced_not_mixed() -> None:
    tokens = torch.tensor([[1, 1, 1, 1], [9, 9, 9, 9]])
    found = probe_inputs(TensorDataset(tokens, tokens), count=50, seed=0)
    assert found.dtype == np.int64
    assert set(np.unique(found)) == {1, 9}
