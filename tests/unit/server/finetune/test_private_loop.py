"""DP-SGD by several processes: their sum, its noise, and who is drawn."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedcore.config.run import RunConfig
from fedcore.errors import PrivacyError, UnsupportedLayer
from fedcore.privacy.accounting import epsilon_of
from fedcore.task.definition import Task
from fedcore.task.model import build_model
from server.finetune.control import ALONE, make_group
from server.finetune.curve import Curve
from server.finetune.private_loop import train_privately
from server.finetune.private_plan import plan_of
from tests.unit.server.finetune.conftest import (
    EXAMPLES,
    Grouped,
    make_examples,
    make_run,
    make_task,
)

CPU = torch.device("cpu")


def private_run(*, epochs: int = 3, **privacy: Any) -> RunConfig:
    settings = {"unit": "example", "target_delta": 1e-3, **privacy}
    return make_run(epochs=epochs, optimizer="sgd", learning_rate=0.5, remember=0.0,
                    privacy=settings)  # fmt: skip


def small_task(loss: object = None, width: int = 8) -> Task:
    return make_task(
        loss, model=lambda: nn.Sequential(nn.Linear(5, width), nn.ReLU(), nn.Linear(width, 3))
    )


class Scripted:
    """Draws batches from a list of rows of the whole data, and adds no noise, or the system's."""

    def __init__(self, steps: Sequence[Sequence[int]], rank: int, world: int) -> None:
        self.steps, self.rank, self.world, self.asked = list(steps), rank, world, list[float]()

    def seed(self) -> int:
        return 0

    def poisson(self, count: int, rate: float) -> Tensor:
        self.asked.append(rate)
        rows = [row for row in self.steps.pop(0) if row % self.world == self.rank]
        return torch.tensor([row // self.world for row in rows], dtype=torch.int64)

    def add_noise(self, sums: Sequence[Tensor], *, deviation: float, bound: float) -> None:
        assert self.rank == 0, "only one process may add noise"


def trained(
    run: RunConfig, rank: int, world: int, *, task: Task | None = None, **given: Any
) -> tuple[Tensor, Curve]:
    task, curve = task or small_task(), Curve()
    model = build_model(task, run)
    train_privately(
        model,
        task,
        make_examples(),
        run,
        CPU,
        group=make_group(CPU) if world > 1 else ALONE,
        curve=curve,
        on_part=lambda part, extent: None,
        **given,
    )
    return nn.utils.parameters_to_vector(model.model.parameters()).detach(), curve


def test_two_processes_take_the_steps_of_one(in_group: Grouped) -> None:
    run = private_run()
    steps = plan_of(run, EXAMPLES).charge.steps
    drawn = [
        [(7 * step + 3 * place) % EXAMPLES for place in range(step % 9)] for step in range(steps)
    ]

    def work(rank: int, world: int) -> list[float]:
        return trained(run, rank, world, draws=Scripted(drawn, rank, world))[0].tolist()

    one, (first, second) = torch.tensor(work(0, 1)), in_group(2, work)
    assert first == second
    first = torch.tensor(first)
    torch.testing.assert_close(first, one, rtol=1e-5, atol=1e-6)
    start = nn.utils.parameters_to_vector(build_model(small_task(), run).model.parameters())
    assert (one - start).norm() > 0.1


def test_processes_add_the_noise_of_one_mechanism_and_draw_at_its_rate(in_group: Grouped) -> None:
    task = small_task(loss=lambda outputs, targets: 0.0 * outputs.sum(-1).mean(), width=2000)
    run = private_run(epochs=1, noise_multiplier=2.0, clip_norm=3.0)
    plan = plan_of(run, EXAMPLES)
    start = nn.utils.parameters_to_vector(build_model(task, run).model.parameters()).detach()

    def work(rank: int, world: int) -> tuple[list[float], tuple[int, ...]]:
        weights, curve = trained(run, rank, world, task=task)
        return weights.tolist(), tuple(part.examples for part in curve.parts)

    (first, drawn), (second, _) = in_group(2, work)
    assert first == second
    # Six steps of SGD with momentum 0.9: the noise of step k counts 1 + 0.9 + ... times.
    left = range(plan.charge.steps)
    shares = [sum(0.9**power for power in range(plan.charge.steps - step)) for step in left]
    deviation = 0.5 * 2.0 * 3.0 / 7 * math.sqrt(sum(share**2 for share in shares))
    moved = torch.tensor(first) - start
    assert moved.std().item() == pytest.approx(deviation, rel=0.03)  # 20,000 weights
    assert abs(moved.mean().item()) < 5 * deviation / math.sqrt(len(moved))
    mean = EXAMPLES * plan.charge.steps * plan.charge.sample_rate
    assert abs(sum(drawn) - mean) < 5 * math.sqrt(mean)


def test_the_plan_keeps_all_trainings_within_the_budget() -> None:
    run = private_run(max_epsilon=3.0, trainings=2)
    charge = plan_of(run, EXAMPLES).charge
    assert (charge.steps, charge.sample_rate) == (18, 1 / 6)
    spent = [
        epsilon_of([charge] * number, target_delta=1e-3, accountant="prv") for number in (1, 2, 3)
    ]
    assert spent[0] < 2.9 < spent[1] <= 3.0 < spent[2]
    with pytest.raises(
        PrivacyError, match=r"target_delta = 0\.003 on 44 examples.*set it to 0\.002"
    ):
        plan_of(private_run(target_delta=0.003), EXAMPLES)


def test_a_layer_that_mixes_examples_is_refused() -> None:
    with pytest.raises(UnsupportedLayer, match="BatchNorm1d"):
        trained(private_run(), 0, 1, task=make_task())


def test_a_stopped_training_goes_on_from_its_checkpoint(place: Path) -> None:
    run = private_run(epochs=40)
    steps = plan_of(run, EXAMPLES).charge.steps
    asked = iter([False] * 3 + [True] * steps)
    with pytest.raises(KeyboardInterrupt):
        trained(run, 0, 1, place=place, stop=lambda: next(asked))
    kept = max(int(each.name.removeprefix("step-")) for each in place.iterdir())
    assert 0 < kept < steps
    draws = Scripted([[1, 2, 3]] * (steps - kept), 0, 1)
    _, curve = trained(run, 0, 1, place=place, draws=draws)
    assert not draws.steps
    assert curve.parts[-1].first_step + len(curve.parts[-1].losses) == steps
