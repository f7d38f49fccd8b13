"""Metrics of classes: as scikit-learn computes them, and over clients as over all rows."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk
from torch import Tensor

from fedcore import metrics as fm
from fedcore.errors import TaskError
from fedcore.seeds import torch_rng
from fedcore.task.class_statistics import area_resolution, auc_statistics
from fedcore.task.measured import measure_outputs, value_of_sums
from fedcore.task.metrics import Metric
from fedcore.task.statistics import exact_sum


def rows(count: int = 200, classes: int = 4, seed: int = 0) -> tuple[Tensor, Tensor]:
    rng = torch_rng(seed, "rows")
    targets = torch.randint(classes, (count,), generator=rng)
    outputs = torch.nn.functional.one_hot(targets, classes) + torch.randn(
        count, classes, generator=rng
    )
    return outputs, targets


def test_averages_over_classes_are_those_of_scikit_learn() -> None:
    outputs, targets = rows()
    targets[targets == 3] = 2  # a class that is only ever decided for
    decided = outputs.argmax(-1)
    for metric, expected in (
        (fm.PRECISION, sk.precision_score),
        (fm.RECALL, sk.recall_score),
        (fm.F1, sk.f1_score),
        (fm.mean_iou(axis=-1), sk.jaccard_score),
    ):
        value = expected(targets, decided, average="macro", zero_division=0)
        assert metric.compute(outputs, targets) == pytest.approx(value, abs=1e-12)


@pytest.mark.parametrize("one_logit", [True, False])
def test_figures_of_two_classes_are_those_of_scikit_learn(one_logit: bool) -> None:
    outputs, targets = rows(classes=2)
    logits, axis = outputs[:, 1] - outputs[:, 0], None if one_logit else -1
    given_ = logits[:, None] if one_logit else outputs
    decided = (logits > 0).long()
    for metric, expected in (
        (fm.precision("binary", axis=axis), sk.precision_score),
        (fm.recall("binary", axis=axis), sk.recall_score),
        (fm.f1("binary", axis=axis), sk.f1_score),
        (fm.accuracy(axis=axis), sk.accuracy_score),
    ):
        assert metric.compute(given_, targets) == pytest.approx(expected(targets, decided))
    area = fm.auc(axis=axis).compute(given_, targets)
    assert area == pytest.approx(sk.roc_auc_score(targets, logits), abs=1e-3)


def test_top_k_and_a_function_of_the_confusion_matrix_are_those_of_scikit_learn() -> None:
    outputs, targets = rows(classes=5)
    top = fm.top_k(2)
    assert top.name == "top_2_accuracy"
    assert top.compute(outputs, targets) == pytest.approx(
        sk.top_k_accuracy_score(targets, outputs, k=2)
    )

    def kappa(counts: Tensor) -> Tensor:
        n = counts.sum()
        chance = (counts.sum(0) * counts.sum(1)).sum() / n**2
        return (counts.trace() / n - chance) / (1 - chance)

    found = fm.from_confusion("kappa", kappa, low=-1.0, high=1.0).compute(outputs, targets)
    assert found == pytest.approx(sk.cohen_kappa_score(targets, outputs.argmax(-1)))


def test_images_have_their_classes_in_the_first_axis_and_ignored_places_count_for_nothing() -> None:
    rng = torch_rng(1, "images")
    outputs, targets = torch.randn(6, 3, 4, 5, generator=rng), torch.randint(3, (6, 4, 5))
    targets[:, 0] = 255
    targets[:, 1] = -1
    kept = targets[:, 2:].flatten()
    decided = outputs.argmax(1)[:, 2:].flatten()
    for metric, average in (
        (fm.mean_iou(ignored=255), sk.jaccard_score),
        (fm.dice(ignored=255), sk.f1_score),
    ):
        assert metric.compute(outputs, targets) == pytest.approx(
            average(kept, decided, average="macro")
        )
    pixels = fm.accuracy(axis=1, ignored=255, name="pixel_accuracy")
    assert pixels.compute(outputs, targets) == pytest.approx((kept == decided).double().mean())


@pytest.mark.parametrize("bins", [8, 64, 2048])
def test_the_area_is_within_the_stated_resolution(bins: int) -> None:
    outputs, targets = rows(500, 2, seed=bins)
    statistics = auc_statistics(bins)
    sums = statistics.sums_of(outputs, targets)
    true = sk.roc_auc_score(targets, (outputs[:, 1] - outputs[:, 0]).double())
    resolution = area_resolution(sums)
    assert abs(statistics(outputs, targets) - true) <= resolution + 1e-12
    assert resolution < (0.2 if bins == 8 else 1 / bins)


ALL: tuple[Metric, ...] = (
    *(fm.ACCURACY, fm.F1, fm.PRECISION, fm.RECALL, fm.MEAN_IOU, fm.AUC, fm.top_k(2)),
    *(fm.f1("binary", name="f1_of_1"), fm.mean_iou(axis=-1, name="iou"), fm.PERPLEXITY),
)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=8), st.integers(0, 10_000), st.booleans())
def test_pooled_values_are_those_of_all_rows_in_any_order(
    sizes: list[int], seed: int, regression: bool
) -> None:
    metrics: tuple[Metric, ...] = (fm.RMSE, fm.MAE)
    outputs, targets = rows(sum(sizes), 2, seed)
    if regression:
        outputs, targets = outputs[:, 0], targets + torch.randn(len(targets))
    else:
        metrics = tuple(each for each in ALL if each is not fm.MEAN_IOU)
    parts = zip(outputs.split(sizes), targets.split(sizes), strict=True)
    measured = [measure_outputs(metrics, *part) for part in parts]
    whole = measure_outputs(metrics, outputs, targets)
    for metric in metrics:
        assert metric.statistics is not None
        limits = metric.statistics.limits_for(tuple(outputs.shape[1:]), name=metric.name)
        vectors = [each.sums[metric.name] for each in measured]
        for each, vector in zip(measured, vectors, strict=True):
            assert (vector >= limits.low * each.examples).all()
            assert (vector <= limits.high * each.examples).all()
            assert np.abs(vector).sum() <= limits.total * each.examples
        pooled = exact_sum(vectors)
        assert pooled.tobytes() == exact_sum(vectors[::-1]).tobytes()
        (value, why), expected = value_of_sums(metric, pooled), whole.judged(metric)
        assert why == expected[1]
        assert value == pytest.approx(expected[0], abs=1e-9, nan_ok=True)


@pytest.mark.parametrize(
    ("metric", "why"),
    [
        (fm.AUC, "one class only"),
        (fm.f1("binary"), "class 1 does not occur"),
        (fm.accuracy(ignored=0), "it is nan"),
        (fm.mean_iou(axis=-1, ignored=0), "no target counts"),
    ],
)
def test_what_is_undefined_says_why(metric: Metric, why: str) -> None:
    outputs = torch.tensor([[1.0, 0.0]] * 4)
    assert measure_outputs([metric], outputs, torch.zeros(4)).judged(metric)[1] == why


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: fm.top_k(0), "at least 1"),
        (lambda: fm.auc(1), "2 to 32768 bins"),
        (lambda: fm.f1("micro"), "expected 'macro' or 'binary'"),  # type: ignore[arg-type]
    ],
)
def test_wrong_settings_of_a_metric_are_refused(make: Any, said: str) -> None:
    with pytest.raises(TaskError, match=said):
        make()


@pytest.mark.parametrize("shape", [(), (1,)])
def test_single_outputs_are_logits_of_two_classes(shape: tuple[int, ...]) -> None:
    outputs, targets = torch.tensor([-2.0, 1.0, 3.0, 0.5]), torch.tensor([0, 0, 1, 1])
    for metric, expected in ((fm.AUC, 0.75), (fm.ACCURACY, 0.75), (fm.F1, (2 / 3 + 4 / 5) / 2)):
        given_ = outputs.reshape(-1, *shape), targets.reshape(-1, *shape)
        assert metric.compute(*given_) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("shape", [(4, 1), (1, 4), (5,)])
def test_targets_of_another_shape_are_not_broadcast(
    shape: tuple[int, ...],
) -> None:
    measured = measure_outputs([fm.ACCURACY], torch.zeros(4, 3), torch.zeros(shape))
    value, why = measured.judged(fm.ACCURACY)
    assert math.isnan(value)
    assert "do not belong to targets of shape" in why
