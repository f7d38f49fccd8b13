"""What DP-SGD draws, against what its plan says. Seeds are fixed: no test here can flicker.

Bounds are those at which a correct implementation would fail for one seed in a million.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from fedcore.config.run import ClientConfig
from fedcore.privacy.accounting import Charge, epsilon_of
from fedcore.privacy.draws import FLOAT_MARGIN, Draws, SimulatedDraws
from fedcore.privacy.planning import PrivatePlan
from fedcore.seeds import torch_rng
from fedcore.training.per_example.gradient_methods import GradientMethod
from fedcore.training.private import train_private
from tests.ways import way_of

ONE_IN_A_MILLION = 4.9  # standard deviations of a normal variable, both sides


def no_signal(outputs: Tensor, targets: Tensor) -> Tensor:
    """A loss whose gradient is zero, so that weights move by noise alone."""
    return (0 * outputs).sum()


def moves(
    charge: Charge, *, clip: float, settings: ClientConfig, count: int = 40, size: int = 20_000
) -> Tensor:
    """How far each weight moved when there was nothing to learn."""
    model = nn.Linear(size, 1, bias=False)
    before = model.weight.detach().clone()
    data: Any = TensorDataset(torch.zeros(count, size), torch.zeros(count))
    train_private(
        nn.Identity(),
        model,
        data,
        no_signal,
        settings,
        PrivatePlan(charge, clip),
        method=way_of(model, no_signal, torch.zeros(size), "regression"),
        draws=SimulatedDraws(torch_rng(3, "sampling"), torch_rng(3, "noise")),
    )
    return (model.weight.detach() - before).double().flatten()


def check_normal(values: Tensor, deviation: float) -> None:
    """Mean, variance and fourth moment of independent normal values, each within its bound."""
    z, count = values / deviation, len(values)
    assert abs(z.mean().item()) < ONE_IN_A_MILLION / math.sqrt(count)
    assert abs(z.square().mean().item() - 1) < ONE_IN_A_MILLION * math.sqrt(2 / count)
    assert abs((z**4).mean().item() - 3) < ONE_IN_A_MILLION * math.sqrt(96 / count)
    neighbours = (z[1:] * z[:-1]).mean().item()
    assert abs(neighbours) < ONE_IN_A_MILLION / math.sqrt(count)


@pytest.mark.parametrize(
    ("noise", "clip", "rate"), [(1.0, 1.0, 1.0), (2.5, 0.3, 1.0), (0.7, 4.0, 0.25)]
)
def test_the_noise_has_the_deviation_that_the_plan_says(
    noise: float, clip: float, rate: float
) -> None:
    moved = moves(Charge(1, noise, rate, 1), clip=clip, settings=ClientConfig(learning_rate=1.0))
    check_normal(moved, noise * clip / (40 * rate) * (1 + FLOAT_MARGIN))


def test_every_step_draws_noise_of_its_own_with_or_without_examples() -> None:
    steps = 9
    for rate, batch in ((0.5, 20), (1e-9, 1)):  # the second leaves every batch empty
        moved = moves(
            Charge(1, 1.0, rate, steps), clip=1.0, settings=ClientConfig(learning_rate=1.0)
        )
        check_normal(moved, math.sqrt(steps) / batch)


def of_outputs(outputs: Tensor, targets: Tensor) -> Tensor:
    """A loss whose gradient is an example's own values."""
    return outputs.mean()


@dataclass(frozen=True)
class Noted:
    """Draws that note which rows each batch holds, and which each sum is made of."""

    draws: Draws
    batches: list[Tensor] = field(default_factory=list)
    summed: list[Tensor] = field(default_factory=list)

    def seed(self) -> int:
        return self.draws.seed()

    def poisson(self, count: int, rate: float) -> Tensor:
        self.batches.append(self.draws.poisson(count, rate))
        return self.batches[-1]

    def add_noise(self, sums: Sequence[Tensor], *, deviation: float, bound: float) -> None:
        self.summed.append(sums[0].flatten().clone())
        self.draws.add_noise(sums, deviation=deviation, bound=bound)


def batches(count: int, rate: float, steps: int) -> list[Tensor]:
    """The rows of every step; each is seen to be in its step's sum once, and no other is."""

    model = nn.Linear(count, 1, bias=False)  # the gradient of row i is the i-th unit vector
    noted = Noted(SimulatedDraws(torch_rng(7, "sampling"), torch_rng(7, "noise")))
    data: Any = TensorDataset(torch.eye(count), torch.zeros(count))
    train_private(
        nn.Identity(),
        model,
        data,
        of_outputs,
        ClientConfig(),
        PrivatePlan(Charge(1, 1.0, rate, steps), 2.0),
        method=way_of(model, of_outputs, torch.zeros(count), "regression"),
        draws=noted,
    )
    for rows, total in zip(noted.batches, noted.summed, strict=True):
        assert torch.equal(total, torch.bincount(rows, minlength=count).double())
    return noted.batches


@pytest.mark.parametrize("rate", [1 / 16, 0.3])
def test_each_example_is_drawn_at_the_rate_that_is_accounted(rate: float) -> None:
    count, steps = 200, 400
    drawn = batches(count, rate, steps)
    sizes = torch.tensor([len(batch) for batch in drawn], dtype=torch.float64)
    trials, variance = count * steps, rate * (1 - rate)
    deviation = math.sqrt(variance / trials)
    assert abs(sizes.sum().item() / trials - rate) < ONE_IN_A_MILLION * deviation
    # Independent draws: sizes vary as a binomial does, which fixed-size batches would not.
    spread = sizes.var().item() / (count * variance)
    assert abs(spread - 1) < ONE_IN_A_MILLION * math.sqrt(2 / (steps - 1))
    by_example = torch.bincount(torch.cat(drawn), minlength=count).double() / steps
    fit = ((by_example - rate).square() / (variance / steps)).mean().item()
    assert abs(fit - 1) < ONE_IN_A_MILLION * math.sqrt(2 / count)
    assert all(len(batch) == len(batch.unique()) for batch in drawn)


def test_a_rate_of_one_draws_every_example_in_every_step() -> None:
    assert all(len(batch) == 50 for batch in batches(50, 1.0, 20))


def released(examples: Tensor, noise: float, trial: int, method: GradientMethod) -> float:
    """One weight after one step on examples whose gradients are their own values."""
    model = nn.Linear(1, 1, bias=False)
    data: Any = TensorDataset(examples, torch.zeros(len(examples)))
    with torch.no_grad():
        model.weight.zero_()
    train_private(
        nn.Identity(),
        model,
        data,
        of_outputs,
        ClientConfig(learning_rate=1.0),
        PrivatePlan(Charge(1, noise, 1.0, 1), 1.0),
        method=method,
        draws=SimulatedDraws(
            torch_rng(trial, "sampling"),
            torch_rng(trial, "noise", len(examples), int(examples.sum())),
        ),
    )
    return model.weight.item()


def audit(noise: float, trials: int) -> Iterator[float]:
    """Lower bounds on epsilon, from telling runs with one extreme example from runs without."""
    without, within = torch.zeros(4, 1), torch.tensor([[100.0], [0.0], [0.0], [0.0]])
    method = way_of(nn.Linear(1, 1, bias=False), of_outputs, torch.zeros(1), "regression")
    seen = torch.tensor([released(within, noise, trial, method) for trial in range(trials)])
    unseen = torch.tensor([released(without, noise, trial, method) for trial in range(trials)])
    slack = math.sqrt(math.log(1e6) / (2 * trials))  # Hoeffding, one in a million
    for threshold in (-0.05, -0.125, -0.2, -0.3):
        right = (seen < threshold).double().mean().item()
        wrong = (unseen < threshold).double().mean().item()
        if right > slack:
            yield math.log((right - slack) / (wrong + slack))


@pytest.mark.slow
def test_nobody_tells_apart_what_epsilon_says_cannot_be_told_apart() -> None:
    claimed = epsilon_of([Charge(1, 2.0, 1.0, 1)], target_delta=1e-5, accountant="rdp")
    assert max(audit(2.0, 1500)) < claimed
    # The attack is strong enough to find a tenth of the noise out.
    assert max(audit(0.2, 1500)) > claimed
