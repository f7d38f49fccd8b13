"""How sure the final test is, and what it says by class and by confidence."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import binomtest

from fedcore.metrics import AUC, F1, RMSE
from fedcore.seeds import torch_rng
from fedcore.task.metrics import ACCURACY
from server.records import CalibrationBin
from server.release.final_details import (
    calibration_of,
    details_of,
    expected_calibration_error,
    interval_of,
)
from server.report.final_test import classes_table, confusion_table
from tests.unit.fedcore.clients import make_task


def rows(count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch_rng(seed, "rows")
    targets = torch.randint(3, (count,), generator=rng)
    noise = torch.randn(count, 3, generator=rng)
    return torch.nn.functional.one_hot(targets, 3) + noise, targets


@pytest.mark.parametrize("right", [0, 7, 50])
def test_an_accuracy_has_wilsons_interval(right: int) -> None:
    targets = torch.zeros(50, dtype=torch.long)
    outputs = torch.tensor([[1.0, 0.0]] * right + [[0.0, 1.0]] * (50 - right))
    interval, method = interval_of(ACCURACY, outputs, targets)
    expected = binomtest(right, 50).proportion_ci(method="wilson")
    assert method == "Wilson"
    assert interval == pytest.approx((expected.low, expected.high))


@pytest.mark.parametrize("metric", [F1, RMSE], ids=lambda each: each.name)
def test_other_metrics_have_an_interval_that_covers_the_value_of_many_rows(metric: object) -> None:
    """95 % of intervals; 88 % leaves room for three standard errors of 150 draws."""

    def drawn(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        outputs, targets = rows(count, seed)
        if metric is F1:
            return outputs, targets
        return outputs[:, 0], targets.float()

    assert metric in (F1, RMSE)
    truth = metric.compute(*drawn(200_000, 1))  # type: ignore[attr-defined]
    covers = 0
    for seed in range(150):
        interval, method = interval_of(metric, *drawn(200, seed + 2))  # type: ignore[arg-type]
        assert interval is not None
        assert method == "jackknife"
        covers += interval[0] <= truth <= interval[1]
    assert covers / 150 > 0.88


def test_an_interval_does_not_depend_on_classes_in_turn() -> None:
    rng = torch_rng(0, "turns")
    targets = torch.arange(600) % 2
    logits = targets + torch.randn(600, generator=rng)
    interval, _ = interval_of(AUC, torch.stack([-logits, logits], 1), targets)
    assert interval is not None
    assert 0.05 < interval[1] - interval[0] < 0.15  # the area's deviation is about 0.02


def test_there_is_no_interval_of_one_row_or_of_no_value() -> None:
    one = torch.tensor([1.0])
    assert interval_of(RMSE, one, one) == (None, "")
    assert interval_of(RMSE, one * math.nan, one) == (None, "")


def test_figures_by_class_and_the_confusion_matrix_count_every_row() -> None:
    task = replace(make_task(), labels=("a", "b", "c"))
    outputs, targets = rows(300)
    targets[targets == 2] = 1  # a class without targets
    details = details_of(task, outputs, targets)
    confusion = np.array(details.confusion)
    assert confusion.sum() == details.examples == 300
    assert [each.label for each in details.classes] == ["a", "b", "c"]
    assert [each.support for each in details.classes] == confusion.sum(axis=1).tolist()
    assert details.classes[0].recall == pytest.approx(confusion[0, 0] / confusion[0].sum())
    assert (details.classes[2].recall, details.classes[2].precision) == (None, 0.0)
    assert sum(each.decisions for each in details.calibration) == 300


@pytest.mark.parametrize(
    ("kind", "outputs", "targets", "classes"),
    [
        ("binary", torch.zeros(6, 1), torch.ones(6, 1), 2),
        ("multilabel", torch.zeros(6, 4), torch.ones(6, 4), 4),
        ("segmentation", torch.zeros(6, 3, 2, 2), torch.zeros(6, 2, 2).long(), 3),
        ("next_token", torch.zeros(6, 2, 5), torch.zeros(6, 2).long(), 5),
        ("next_token", torch.zeros(6, 2, 500), torch.zeros(6, 2).long(), 0),
        ("regression", torch.zeros(6, 2), torch.zeros(6, 2), 0),
        ("classification", torch.zeros(6, 3), torch.full((6, 3), 1 / 3), 0),
    ],
)
def test_each_kind_has_the_details_that_it_can_have(
    kind: str, outputs: torch.Tensor, targets: torch.Tensor, classes: int
) -> None:
    details = details_of(make_task(kind=kind), outputs, targets)
    assert (details.examples, len(details.classes)) == (6, classes)
    decides = (kind != "regression" and targets.shape != outputs.shape) or kind == "multilabel"
    assert (details.calibration_error is not None) == (decides or kind == "binary")


def test_each_of_several_labels_has_its_name_and_its_figures() -> None:
    task = make_task(kind="multilabel", labels=("rain", "wind"), ignore_index=-1)
    outputs = torch.tensor([[1.0, -1], [1, -1], [-1, 1], [1, 1]])
    targets = torch.tensor([[1.0, 0], [0, 0], [1, -1], [1, 1]])
    details = details_of(task, outputs, targets)
    rain, wind = details.classes
    assert (rain.label, rain.support, rain.precision, rain.recall) == ("rain", 3, 2 / 3, 2 / 3)
    assert (wind.label, wind.support, wind.precision, wind.recall) == ("wind", 1, 1.0, 1.0)
    assert details.confusion == ()
    table = classes_table(details)
    assert table is not None
    assert table.headings[0] == "label"
    assert confusion_table(details) is None


def test_calibration_is_the_distance_of_confidence_and_share_of_right_ones() -> None:
    probabilities = torch.tensor([[0.9, 0.1]] * 10 + [[0.4, 0.6]] * 10)
    true = torch.tensor([0] * 9 + [1] + [1] * 2 + [0] * 8)
    bins = calibration_of(probabilities, true)
    assert bins == (
        CalibrationBin(10, pytest.approx(0.6), pytest.approx(0.2)),
        CalibrationBin(10, pytest.approx(0.9), pytest.approx(0.9)),
    )
    assert expected_calibration_error(bins) == pytest.approx(0.2)
    of_logits = calibration_of(probabilities.log(), true)
    assert [each.accuracy for each in of_logits] == [each.accuracy for each in bins]
    assert expected_calibration_error(()) is None
