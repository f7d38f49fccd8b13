"""No example changes how the others are read, drawn for or rounded."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset

from fedcore.task.definition import Examples, Loss
from fedcore.task.model import FullModel
from fedcore.training.per_example.clipped_sum import Batch, clipped_sum, read_batch
from fedcore.training.per_example.gradient_methods import (
    GradientMethod,
    one_by_one,
    vmap_method,
)
from fedcore.training.per_example.trial import choose_method
from tests.unit.fedcore.clients import make_task

CPU = torch.device("cpu")
LOSS = functional.cross_entropy
COUNT = 11
HUGE = 1e30  # a clip norm that clips nothing


def summed(
    way: GradientMethod,
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    *,
    counted: Tensor | None = None,
    loss: Loss = LOSS,
    clip: float = HUGE,
    physical: int = 256,
) -> Tensor:
    every = torch.ones(len(targets), dtype=torch.bool) if counted is None else counted
    found = clipped_sum(
        way,
        nn.Identity(),
        model,
        loss,
        [Batch(inputs, targets, every, 0)],
        clip_norm=clip,
        physical=physical,
    )
    return torch.cat([one.flatten() for one in found.sums])


def test_few_rows_are_read_at_a_time_so_that_one_rows_shape_decides_little_memory() -> None:
    class OneLarge(Dataset[Any]):
        def __len__(self) -> int:
            return 600

        def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
            return torch.zeros(4), torch.zeros(4096 if row == 300 else 1, dtype=torch.complex128)

    data: Examples = OneLarge()  # type: ignore[assignment]
    usual = (torch.Size([4]), torch.float32)
    batches = list(read_batch(data, torch.arange(600), CPU, seed=0, usual=usual))
    assert [int(one.counted.sum()) for one in batches] == [256, 255, 1, 88]
    assert max(one.targets.numel() for one in batches) <= 256 * 4096


def test_an_example_does_not_change_how_the_others_are_rounded() -> None:
    """Its value lifts their sum past a power of two, where each of them is rounded up or down."""

    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1, 1))

        def forward(self, x: Tensor) -> Tensor:
            return functional.linear(x, self.weight)

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs * targets).mean()

    step = 2.0**-16  # of float32 from 128 on
    half = (0.25 / step // 2 * 2 + 1.5) * step
    below = [1 - 2.0**-10] * 127
    rest = [value for _ in range(63) for value in (half, -half - step)]
    rows = torch.tensor([1 - 2.0**-12, *below, 127.5 - sum(below), *rest]).unsqueeze(1)
    way = vmap_method(1, loss, why="")
    targets = torch.ones(len(rows), 1)
    counted = torch.ones(len(rows), dtype=torch.bool)
    whole = summed(way, Scale(), rows, targets, loss=loss, clip=1.0)
    counted[0] = False
    without = summed(way, Scale(), rows, targets, counted=counted, loss=loss, clip=1.0)
    assert float((whole - without).abs()) <= 1 + 5e-5


class Coin(nn.Module):
    """Drops its input by a number that is drawn outside torch: one for all, under `vmap`."""

    def __init__(self, draw: Callable[[], float]) -> None:
        super().__init__()
        self.draw, self.dense = draw, nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return cast(
            Tensor, self.dense(torch.zeros_like(x) if self.training and self.draw() < 0.5 else x)
        )


DRAWS: dict[str, Callable[[], float]] = {
    "python": lambda: random.random(),  # not the method itself, which copies take a stream with
    "numpy": lambda: float(np.random.random()),
}


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
def test_a_number_drawn_outside_torch_is_each_examples_own(draw: Callable[[], float]) -> None:
    model = Coin(draw)
    inputs, targets = torch.randn(COUNT, 4), torch.arange(COUNT) % 3
    together = vmap_method(15, LOSS, why="")
    found = summed(together, model, inputs, targets)
    alone = summed(one_by_one(LOSS, why=""), model, inputs, targets, physical=1)
    assert torch.allclose(found, alone)
    task = make_task(model=lambda: Coin(draw), example_input=torch.zeros(4))
    way = choose_method(task, FullModel(nn.Identity(), Coin(draw)))
    assert (way.name, way.why) == (
        "alone",
        "it draws random numbers with Python's or NumPy's random",
    )
