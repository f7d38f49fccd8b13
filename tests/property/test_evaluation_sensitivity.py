"""How far one held-out example can move the sums that an evaluation adds noise to.

Two data sets differ in one example, which one of them replaces by a row that cannot be read.
Models may mix the examples of a batch, and metrics may declare limits that they do not keep: the
sums without noise move by at most what the charge is for.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import Dataset

import fedcore
from fedcore.errors import ConfigError
from fedcore.privacy.contributions import (
    ContributionBounds,
    contribution_bounds,
    statistics_limits,
)
from fedcore.task.metrics import ACCURACY, MAE, PERPLEXITY, RMSE, Metric
from fedcore.task.statistics import Statistics, SumLimits
from fedcore.training.noised_evaluation import answer_of, clipped_sums

COUNT, PLACE, WIDTH = 6, 2, 3
ROUNDING = 1e-9


class Rows(Dataset[tuple[Tensor, Tensor]]):
    """Rows of which one may be missing."""

    def __init__(self, inputs: Tensor, targets: Tensor, missing: int | None = None) -> None:
        self.inputs, self.targets, self.missing = inputs, targets, missing

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
        if row == self.missing:
            raise OSError("a broken file")
        return self.inputs[row], self.targets[row]


class Mixes(nn.Module):
    """A model whose outputs depend on the whole batch."""

    def forward(self, x: Tensor) -> Tensor:
        return (x - x.mean(0)) * len(x) ** 3 + x.sum()


def liar(sums: Callable[[Tensor, Tensor], Tensor]) -> Metric:
    """A metric whose sums are not within what it declares."""
    limits = Statistics(sums, lambda s: s[0], [(0.0, 1.0), (-1.0, 2.0)], total=2.0)
    return Metric("liar", limits, higher_is_better=True)


METRICS: dict[str, tuple[Metric, float]] = {
    "accuracy": (ACCURACY, math.inf),
    "auc": (fedcore.metrics.auc(8), math.inf),
    "confusion": (
        fedcore.metrics.from_confusion("all", lambda counts: counts.trace()),
        math.inf,
    ),
    "rmse": (RMSE, 4.0),
    "mae": (MAE, 0.5),
    "huge": (liar(lambda o, t: torch.stack([o.sum() * 1e30, -o.sum() * 1e300])), math.inf),
    "not finite": (liar(lambda o, t: torch.stack([o.sum() / 0, t.sum()])), math.inf),
    "of another length": (liar(lambda o, t: o.flatten()), math.inf),
}
NUMBERS = st.floats(-(2.0**99), 2.0**99, width=32) | st.sampled_from(
    [0.0, 1.0, -1.0, math.inf, math.nan]
)


def bounds_for(metric: Metric, cap: float) -> ContributionBounds:
    shape = (2 if metric.name == "auc" else WIDTH,)
    return contribution_bounds(metric, statistics_limits(metric, shape), {metric.name: cap})


@pytest.mark.parametrize("model", [nn.Identity, Mixes])
@pytest.mark.parametrize("name", METRICS)
@given(drawn=st.data())
def test_one_example_moves_the_sums_by_at_most_what_the_charge_is_for(
    name: str, model: type[nn.Module], drawn: st.DataObject
) -> None:
    metric, cap = METRICS[name]
    width = 2 if metric.name == "auc" else WIDTH
    numbers = drawn.draw(st.lists(NUMBERS, min_size=COUNT * width, max_size=COUNT * width))
    inputs = torch.tensor(numbers).reshape(COUNT, width)
    if metric in (RMSE, MAE):
        targets = inputs.flip(0)
    else:
        classes = st.integers(-2, 4)  # some of which no output belongs to
        targets = torch.tensor(drawn.draw(st.lists(classes, min_size=COUNT, max_size=COUNT)))
    bounds = bounds_for(metric, cap)

    def found(missing: int | None) -> Any:
        rows: Any = Rows(inputs, targets, missing)
        return clipped_sums(answer_of(model()), rows, metric, bounds, seed=1)

    whole, without = found(None), found(PLACE)
    assert np.isfinite(whole.shares).all()
    assert np.linalg.norm(whole.shares - without.shares) <= bounds.norm * (1 + ROUNDING)
    assert np.linalg.norm(whole.shares) <= COUNT * bounds.norm * (1 + ROUNDING)


@given(
    low=st.lists(st.floats(-1e9, 1e9), min_size=3, max_size=3),
    high=st.lists(st.floats(-1e9, 1e9), min_size=3, max_size=3),
    total=st.floats(1e-9, math.inf),
    cap=st.floats(1e-9, 1e9),
    given=st.lists(st.floats(allow_nan=True), min_size=3, max_size=3),
)
def test_a_contribution_is_cut_to_its_bounds(
    low: list[float], high: list[float], total: float, cap: float, given: list[float]
) -> None:
    ordered = np.sort(np.array([low, high]), axis=0)
    limits = SumLimits(ordered[0], ordered[1], total)
    bounds = contribution_bounds(ACCURACY, limits, {"accuracy": cap})
    shares = bounds.clipped(np.array(given))
    assert np.linalg.norm(shares) <= bounds.norm * (1 + ROUNDING)
    assert bounds.norm <= math.sqrt(3)
    assert (bounds.deviations(2.0) == 2.0 * bounds.norm * bounds.scale).all()


def test_a_right_or_wrong_decision_counts_as_one() -> None:
    bounds = bounds_for(ACCURACY, math.inf)
    assert bounds.norm == 1.0
    assert bounds.scale.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("metric", [RMSE, MAE])
def test_a_metric_without_bounds_needs_a_limit(metric: Metric) -> None:
    with pytest.raises(ConfigError, match=f"set privacy.evaluation_limits.{metric.name}"):
        bounds_for(metric, math.inf)
    assert bounds_for(PERPLEXITY, math.inf).norm == pytest.approx(math.sqrt(2))


def test_a_function_of_all_outputs_at_once_takes_no_noise() -> None:
    median = Metric("median", lambda outputs, targets: float(outputs.median()), True)
    with pytest.raises(ConfigError, match="a function of all outputs at once"):
        statistics_limits(median, (2,))
