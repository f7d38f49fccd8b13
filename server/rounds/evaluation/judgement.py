"""How two models compare on the data of the same clients, and how sure that is.

In: an `EvaluationAnswer` of each client for either model. Out: a `Judgement`. Differences between
clients cancel, as each client measures both. Start with `compared`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.special import stdtrit

from fedcore.task.metrics import Metric
from fedcore.task.statistics import FloatVector, exact_sum
from server.rounds.evaluation.pooling import EvaluationAnswer, weighted_sums

CONFIDENCE = 0.95
"""One-sided confidence of the bound on how much worse a model may be over all clients, unless
another one is asked for."""
Pairs = Sequence[tuple[EvaluationAnswer, EvaluationAnswer]]
"""The answers of each client for the first and for the second model."""


@dataclass(frozen=True)
class Judgement:
    """Primary metric of two models, measured by the same clients on their held-out data."""

    clients: int
    """Number of clients that measured both models."""
    examples: int
    """Number of their examples in total."""
    before: float
    """The primary metric over all examples for the first model; for a metric without
    `fedcore.Statistics`, the clients' mean. With noise, it may be outside of the metric's range."""
    after: float
    """The same for the second model."""
    margin: float
    """Half-width of the one-sided confidence bound: how far the measured
    difference may be from the one over all clients, noise included. Infinite where a single client
    measured, or where one client alone makes the metric defined."""

    def worsening(self, primary: Metric) -> float:
        """Returns an upper bound on how much worse the second model is, see `Metric.worsening`."""
        sign = -1.0 if primary.higher_is_better else 1.0
        return primary.worsening(self.before, self.after + sign * self.margin)


def compared(metric: Metric, pairs: Pairs, *, confidence: float = CONFIDENCE) -> Judgement:
    """Compares two models.

    The metric is that of the sums over all clients, if it has sums. The standard error of the
    difference is that of the jackknife that leaves out one client at a time. It covers what differs
    between clients, in size too, and noise that each client has added to its sums. No client is
    left out for being far from the others: it may be the one that a model harms.

    Args:
        metric: The metric, defined on the data of each client unless it has sums.
        pairs: The answers; not empty.
        confidence: The one-sided confidence of the margin.

    Source:
        Efron and Tibshirani 1993, An Introduction to the Bootstrap, chapter 11.
    """
    if metric.statistics is None:
        return judgement(
            [
                (one.weight, one.measured.score(metric), other.measured.score(metric))
                for one, other in pairs
            ],
            confidence=confidence,
        )
    tables = [[weighted_sums(metric, pair[place]) for pair in pairs] for place in (0, 1)]
    totals = [exact_sum(table) for table in tables]
    before, after = (_value(metric, total) for total in totals)
    examples, count = sum(one.weight for one, _ in pairs), len(pairs)
    gaps = [
        _value(metric, totals[1] - one_after) - _value(metric, totals[0] - one_before)
        for one_before, one_after in zip(*tables, strict=True)
        if count > 1
    ]
    margin = math.inf
    if gaps and np.isfinite(gaps).all():
        # Exact sums: the result must not depend on the order of the replies.
        mean = math.fsum(gaps) / count
        squares = math.fsum((gap - mean) ** 2 for gap in gaps)
        error = math.sqrt(squares * (count - 1) / count)
        margin = float(stdtrit(count - 1, confidence)) * error
    return Judgement(count, examples, before, after, margin)


def _value(metric: Metric, sums: FloatVector) -> float:
    """Returns a metric's value, also outside of its range, where noise puts it; else NaN."""
    assert metric.statistics is not None
    try:
        return metric.statistics.value_of(sums)
    except Exception:  # the task's code: undefined for these sums
        return math.nan


def judgement(
    measured: Sequence[tuple[int, float, float]], *, confidence: float = CONFIDENCE
) -> Judgement:
    """Compares the means of clients' values, weighted by their examples.

    Args:
        measured: Number of examples and metric of both models, one tuple per client; not empty.
        confidence: The one-sided confidence of the margin.
    """
    total = sum(examples for examples, _, _ in measured)
    # Exact sums: the result must not depend on the order of the replies.
    before = math.fsum(examples * one for examples, one, _ in measured) / total
    after = math.fsum(examples * other for examples, _, other in measured) / total
    count, margin = len(measured), math.inf
    if count > 1:
        gap = after - before
        squares = ((examples * (other - one - gap)) ** 2 for examples, one, other in measured)
        error = math.sqrt(math.fsum(squares) * count / (count - 1)) / total
        margin = float(stdtrit(count - 1, confidence)) * error
    return Judgement(count, total, before, after, margin)


def unseen_loss(count: int, confidence: float) -> float:
    """Returns the share of lost decisions that ``count`` >= 1 examples miss with 1 - confidence.

    Source:
        Clopper and Pearson 1934, doi:10.1093/biomet/26.4.404, for no loss among ``count``.
    """
    return float(1 - (1 - confidence) ** (1 / count))


def drop_of(
    primary: Metric,
    base: Mapping[str, EvaluationAnswer],
    other: Mapping[str, EvaluationAnswer],
    *,
    few: bool = False,
    confidence: float = CONFIDENCE,
) -> float:
    """Returns an upper bound on how much worse the second file is than the first.

    Uses only clients that measured both; infinite where none did, or the metric is undefined.

    Args:
        primary: The metric.
        base: Answers for the first file, by client.
        other: Answers for the second file, by client.
        few: Whether to raise the bound where the metric is a share: by a loss that no example would
            have shown, as clients that all measured the same do not show that no example of theirs
            is lost; and for the greatest skewness of rare losses, where something changed (see
            `server.compression.confidence.loss_bound`).
        confidence: The one-sided confidence of the bound.
    """
    both = sorted(base.keys() & other.keys())
    if not both:
        return math.inf
    found = compared(primary, [(base[name], other[name]) for name in both], confidence=confidence)
    if few and primary.higher_is_better and primary.low >= 0 and primary.high <= 1:
        scale = float(stdtrit(max(found.clients - 1, 1), confidence))
        skewness = (1 + 2 * scale**2) / (6 * found.examples) if found.margin > 0 else 0.0
        margin = math.hypot(found.margin, unseen_loss(found.examples, confidence))
        found = replace(found, margin=margin + skewness)
    drop = found.worsening(primary)
    return math.inf if math.isnan(drop) else drop
