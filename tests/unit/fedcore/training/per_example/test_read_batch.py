"""Where batches begin does not depend on whether all examples can be used."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import TensorDataset

from fedcore.seeds import torch_rng
from fedcore.task.definition import Examples
from fedcore.task.model import FullModel
from fedcore.training.examples import TaskExamples, canonical
from fedcore.training.per_example.clipped_sum import clipped_sum, read_batch
from fedcore.training.per_example.trial import choose_method
from tests.ways import task_of

WIDTH, CLASSES, NO_CLASS, BAD = 6, 3, 99, 7


class Dropping(nn.Module):
    """Averages over positions, of any number, and drops values: which ones, the place decides."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(WIDTH, 16), nn.Linear(16, CLASSES)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.head(self.drop(torch.relu(self.first(x))).mean(1))
        return found


@pytest.mark.parametrize(
    ("count", "positions", "physical"),
    [(300, 2, 100), (520, 2, 100), (300, 2, 256), (20, 5, 256)],
    ids=["in parts", "in more parts", "as read", "of an unusual shape"],
)
def test_a_label_that_no_class_has_moves_a_sum_by_the_clip_norm_at_most(
    count: int, positions: int, physical: int
) -> None:
    """Data with such a row are read row by row, and others at once."""
    torch.manual_seed(0)
    model, clip = Dropping(), 0.01
    task = replace(task_of(model, functional.cross_entropy, torch.zeros(2, WIDTH)), loss=None)
    method = choose_method(task, FullModel(nn.Identity(), model))
    assert method.name == "chain"
    inputs = torch.randn(count, positions, WIDTH, generator=torch_rng(1))
    targets = torch.randint(CLASSES, (count,), generator=torch_rng(2))
    spoilt = targets.clone()
    spoilt[BAD] = NO_CLASS

    def summed(labels: Tensor) -> tuple[Examples, Tensor]:
        whole: Any = TensorDataset(inputs, labels)
        data = canonical(task, whole, what="data")
        batches = read_batch(
            data, torch.arange(count), torch.device("cpu"), seed=5, usual=method.usual
        )
        found = clipped_sum(
            *(method, nn.Identity(), model, task.loss_of, batches),
            clip_norm=clip,
            physical=physical,
        )
        return data, torch.cat([one.flatten() for one in found.sums])

    fine, before = summed(targets)
    bad, after = summed(spoilt)
    assert not isinstance(fine, TaskExamples)
    assert isinstance(bad, TaskExamples)
    assert 0.9 * clip < (before - after).norm().item() <= clip * (1 + 1e-4)
