"""Details of the final test: interval of the primary metric, figures by class, and calibration.

In: outputs and targets of the released model. Out: a `FinalTestDetails`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from scipy.special import ndtri, stdtrit
from torch import Tensor

from fedcore.seeds import torch_rng
from fedcore.task.class_statistics import Decisions, confusion_counts
from fedcore.task.definition import Task
from fedcore.task.measured import measure_outputs
from fedcore.task.metrics import Metric
from server.records import CalibrationBin, ClassResult, FinalTestDetails

CONFIDENCE = 0.95
"""Two-sided confidence of the interval around the primary metric."""
MAX_CLASSES = 100
"""Most classes with a figure of their own; a vocabulary has more."""
_BINS = 15
_GROUPS = 20
_DECISIONS: dict[str, Decisions] = {
    "label": Decisions(-1),
    "tokens": Decisions(-1),
    "dense": Decisions(1),
    "binary": Decisions(None),
    "labels": Decisions(None),
}


def details_of(task: Task, outputs: Tensor, targets: Tensor) -> FinalTestDetails:
    """Computes the details of a final test.

    Args:
        task: Defines the primary metric, and what outputs mean.
        outputs: Outputs of the released model, ``(N, ...)``.
        targets: Canonical targets, ``(N, ...)``.
    """
    interval, method = interval_of(task.primary, outputs, targets)
    decisions = _DECISIONS.get(task.problem.presentation)
    if decisions is None:
        return FinalTestDetails(len(targets), interval, method)
    decisions = Decisions(decisions.axis, task.options.ignore_index)
    try:
        scores, true = decisions.scores(outputs, targets)
    except ValueError:  # targets of the task's own form, such as shares of classes
        return FinalTestDetails(len(targets), interval, method)
    confusion: tuple[tuple[int, ...], ...] = ()
    if task.problem.presentation == "labels":
        classes = _by_label(task, outputs, targets)
    else:
        classes, confusion = _by_class(task, outputs, targets, decisions)
    bins = calibration_of(scores, true)
    return FinalTestDetails(
        len(targets),
        interval,
        method,
        classes,
        confusion,
        bins,
        expected_calibration_error(bins),
    )


def interval_of(
    metric: Metric, outputs: Tensor, targets: Tensor
) -> tuple[tuple[float, float] | None, str]:
    """Returns a 95 % interval of a metric over examples like these, and the name of the method.

    The share of right decisions, one per example, has Wilson's interval. Other metrics have a
    jackknife: the spread of the metric without one of 20 groups of examples at a time.

    Returns:
        The interval; None where the metric is undefined or there are too few examples.
    """
    measured = measure_outputs([metric], outputs, targets)
    value, why = measured.judged(metric)
    if why:
        return None, ""
    sums = measured.sums.get(metric.name)
    if sums is not None and _is_share(metric) and sums.sum() == len(targets):
        return _wilson(float(sums[0]), len(targets)), "Wilson"
    groups = min(_GROUPS, len(targets))
    # Drawn, not taken in turn: examples may be in an order, such as class by class in turn.
    rng = torch_rng(0, "groups of the final test")
    rows = torch.randperm(len(targets), generator=rng) % max(groups, 1)
    left_out = [
        measure_outputs([metric], outputs[rows != group], targets[rows != group]).score(metric)
        for group in range(groups if groups > 1 else 0)
    ]
    if len(left_out) < 2 or not all(map(math.isfinite, left_out)):
        return None, ""
    middle = math.fsum(left_out) / groups
    squares = math.fsum((each - middle) ** 2 for each in left_out)
    margin = float(stdtrit(groups - 1, (1 + CONFIDENCE) / 2))
    margin *= math.sqrt(squares * (groups - 1) / groups)
    return (max(value - margin, metric.low), min(value + margin, metric.high)), "jackknife"


def _is_share(metric: Metric) -> bool:
    statistics = metric.statistics
    return statistics is not None and statistics.is_share


def _wilson(right: float, count: int) -> tuple[float, float]:
    """Returns Wilson's score interval of a share (Wilson 1927, JASA 22)."""
    z = float(ndtri((1 + CONFIDENCE) / 2))
    share, weight = right / count, 1 + z**2 / count
    middle = (share + z**2 / (2 * count)) / weight
    margin = z / weight * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    return max(0.0, middle - margin), min(1.0, middle + margin)


def _by_class(
    task: Task, outputs: Tensor, targets: Tensor, decisions: Decisions
) -> tuple[tuple[ClassResult, ...], tuple[tuple[int, ...], ...]]:
    """Returns the figures by class and the confusion matrix; both empty for many classes."""
    if decisions.classes(tuple(outputs.shape[1:])) > MAX_CLASSES:
        return (), ()
    counts = confusion_counts(outputs, targets, decisions)
    names = _names(task, len(counts))
    found = []
    for place, name in enumerate(names):
        right = float(counts[place, place])
        decided, support = float(counts[:, place].sum()), float(counts[place].sum())
        found.append(_result(name, right, decided, support))
    return tuple(found), tuple(tuple(int(cell) for cell in row) for row in counts.tolist())


def _by_label(task: Task, outputs: Tensor, targets: Tensor) -> tuple[ClassResult, ...]:
    """Returns for each of several labels how its decisions are; empty for many labels."""
    if outputs.dim() != 2 or outputs.shape[1] > MAX_CLASSES:
        return ()
    ignored, told, true = task.options.ignore_index, outputs > 0, targets > 0
    counted = torch.ones_like(true) if ignored is None else targets != ignored
    found = []
    for place, name in enumerate(_names(task, outputs.shape[1])):
        counts = counted[:, place]
        yes, should = told[counts, place], true[counts, place]
        right, decided, support = (int(n.sum()) for n in (yes & should, yes, should))
        found.append(_result(name, right, decided, support))
    return tuple(found)


def _result(name: str, right: float, decided: float, support: float) -> ClassResult:
    both = decided + support
    return ClassResult(
        name,
        int(support),
        right / decided if decided else None,
        right / support if support else None,
        2 * right / both if both else None,
    )


def _names(task: Task, count: int) -> Sequence[str]:
    if len(task.labels) == count:
        return task.labels
    return [str(number) for number in range(count)]


def calibration_of(scores: Tensor, true: Tensor) -> tuple[CalibrationBin, ...]:
    """Returns, by confidence of the decision, how confident and how right decisions are.

    Args:
        scores: Logits, or probabilities, ``(M, C)``.
        true: Class numbers, ``(M,)``.
    """
    wide = scores.double()
    told = (
        bool((wide >= 0).all()) and bool((wide.sum(dim=1) - 1).abs().max() < 1e-3)
        if len(wide)
        else False
    )
    confidence, decided = (wide if told else wide.softmax(dim=1)).max(dim=1)
    place = (confidence * _BINS).long().clamp(0, _BINS - 1)
    found = []
    for number in range(_BINS):
        inside = place == number
        if bool(inside.any()):
            right = (decided[inside] == true[inside]).double().mean()
            found.append(
                CalibrationBin(int(inside.sum()), float(confidence[inside].mean()), float(right))
            )
    return tuple(found)


def expected_calibration_error(bins: Sequence[CalibrationBin]) -> float | None:
    """Returns the mean distance of confidence and accuracy over decisions; None without any.

    Source:
        Guo et al. 2017, arXiv:1706.04599, with 15 bins of equal width.
    """
    total = sum(each.decisions for each in bins)
    if not total:
        return None
    gaps = (each.decisions * abs(each.accuracy - each.confidence) for each in bins)
    return math.fsum(gaps) / total
