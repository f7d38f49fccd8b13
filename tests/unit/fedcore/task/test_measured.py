"""Metrics of one data set: what a user's function may return, raise or be called."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fedcore.errors import InsufficientMemory, TaskError
from fedcore.task.measured import Measuring, measure_outputs
from fedcore.task.metrics import ACCURACY, Metric, check_metrics
from fedcore.task.statistics import Statistics, exact_sum

OUTPUTS, TARGETS = torch.eye(3), torch.tensor([0, 1, 1])


def of(returned: Any, **more: Any) -> Metric:
    def compute(outputs: Tensor, targets: Tensor) -> Any:
        if isinstance(returned, BaseException):
            raise returned
        return returned

    return Metric("mine", compute, higher_is_better=True, **more)


@pytest.mark.parametrize(
    "returned",
    [0.5, torch.tensor(0.5), torch.tensor([[0.5]]), np.float32(0.5), np.array([0.5])],
    ids=["float", "tensor", "tensor of one", "NumPy scalar", "array of one"],
)
def test_every_kind_of_number_is_one(returned: Any) -> None:
    measured = measure_outputs([of(returned)], OUTPUTS, TARGETS)
    assert measured.values == {"mine": 0.5}
    assert type(measured.values["mine"]) is float


@pytest.mark.parametrize(
    ("returned", "why", "fault"),
    [
        (ValueError("Only one class present"), "Only one class present", False),
        (ZeroDivisionError("division by zero"), "division by zero", False),
        (IndexError("index 99"), "IndexError: index 99", True),
        (SystemExit(), "SystemExit", True),
        (math.nan, "it is nan", False),
        (-math.inf, "it is -inf", False),
        ("0.5", "TypeError: it returned '0.5' (str), not a number", True),
        (None, "TypeError: it returned 'None' (NoneType), not a number", True),
        (torch.zeros(3), "an array of shape (3,), not a number", True),
        (2.0, "2 is not within 0 to 1", True),
        (1 + 1e-15, "", False),
    ],
)
def test_a_metric_without_a_value_leaves_the_others_theirs(
    returned: Any, why: str, fault: bool
) -> None:
    metric = of(returned, low=0.0, high=1.0)
    measured = measure_outputs([metric, ACCURACY], OUTPUTS, TARGETS)
    assert measured.score(ACCURACY) == pytest.approx(2 / 3)
    assert measured.undefined.get("mine", "").endswith(why)
    assert ("mine" in measured.undefined) == bool(why)
    assert measured.faults == ({"mine"} if fault else set())
    assert math.isnan(measured.score(metric)) == bool(why)


def test_a_lack_of_memory_is_no_undefined_metric() -> None:
    for error in (MemoryError(), InsufficientMemory("full"), KeyboardInterrupt()):
        with pytest.raises(type(error)):
            measure_outputs([of(error)], OUTPUTS, TARGETS)


def test_outputs_are_kept_only_where_a_metric_needs_all_at_once() -> None:
    counts, whole = Measuring([ACCURACY]), Measuring([ACCURACY, of(0.5)])
    for each in (counts, whole):
        each.add(OUTPUTS, TARGETS)
        each.add(OUTPUTS, TARGETS)
    assert not counts._outputs
    assert len(whole._outputs) == 2
    assert counts.result().sums["accuracy"].tolist() == [4.0, 2.0]


def test_sums_that_are_not_finite_are_none() -> None:
    metric = Metric("mine", Statistics(lambda o, t: o.sum()[None], lambda s: s[0], [(0, 1)]), True)
    measured = measure_outputs([metric], OUTPUTS * math.inf, TARGETS)
    assert measured.undefined == {"mine": "its sums are not finite"}


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"name": ""}, "its name has 0 characters"),
        ({"name": "x" * 101}, "its name has 101 characters"),
        ({"name": "num-examples"}, "is reserved"),
        ({"name": "a\n"}, "printable"),
        ({"name": 3}, "printable"),
        ({"compute": 0.5}, "its compute is a float"),
        ({"low": 1.0, "high": 0.0}, "expected low below high"),
    ],
)
def test_a_metric_that_cannot_be_reported_is_refused(changed: dict[str, Any], said: str) -> None:
    values: dict[str, Any] = {"name": "m", "compute": lambda o, t: 0.0, "higher_is_better": True}
    with pytest.raises(TaskError, match=said):
        Metric(**values | changed)


def test_metrics_of_one_name_are_refused() -> None:
    with pytest.raises(TaskError, match=r"used twice \('accuracy'\)"):
        check_metrics([ACCURACY, of(0.5), ACCURACY], task="digits")
    with pytest.raises(TaskError, match="contain a function"):
        check_metrics([lambda o, t: 0.0], task="digits")  # type: ignore[list-item]


@pytest.mark.parametrize(
    ("limits", "total"),
    [
        ([], 1.0),
        ([(1.0, 0.0)], 1.0),
        ([1.0], 1.0),
        ([(0.0, math.nan)], 1.0),
        ([(0.0, 1.0)], 0.0),
        (lambda shape: shape[3], 1.0),
        ([(0.0, 1.0)] * 70_000, 1.0),
    ],
)
def test_limits_that_limit_nothing_are_refused(limits: Any, total: float) -> None:
    value: Callable[[Tensor], float] = lambda sums: float(sums[0])  # noqa: E731
    statistics = Statistics(lambda o, t: o.sum()[None], value, limits, total)
    with pytest.raises(TaskError, match=r"metric 'm': its limits for outputs of shape \(3,\)"):
        statistics.limits_for((3,), name="m")


def test_sums_of_any_numbers_do_not_depend_on_their_order() -> None:
    rng = np.random.default_rng(0)
    vectors = [rng.normal(size=5) * 10.0 ** rng.integers(-20, 20, 5) for _ in range(50)]
    assert exact_sum(vectors).tobytes() == exact_sum(vectors[::-1]).tobytes()
    assert exact_sum([np.array([1e16]), np.array([1.0]), np.array([-1e16])]).tolist() == [1.0]
