"""Metrics over several clients: from sums over all of their examples, or the mean of their values.

In: one `EvaluationAnswer` per client. Out: a `Pooled` per metric, which does not depend on the
order of the answers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedcore.task.measured import Measured, value_of_sums
from fedcore.task.metrics import Metric
from fedcore.task.statistics import FloatVector, SumLimits, exact_sum
from fedcore.updates.replies import Reply, ReplySpec
from server.records import MetricSource
from server.rounds.outliers import outlying


@dataclass(frozen=True)
class EvaluationAnswer:
    """What one client measured."""

    name: str
    weight: int
    """Weight of the client, in examples: as many as it measured on, unless something else says."""
    measured: Measured


@dataclass(frozen=True)
class Pooled:
    """One metric over several clients."""

    value: float
    """NaN where the metric is undefined on the examples of all clients."""
    reason: str
    """Why it is undefined; empty otherwise."""
    source: MetricSource
    outliers: Sequence[tuple[str, str]] = ()
    """Names of clients that were left out, far from all others, with what is far: a value, or the
    sums."""


def answer_of(reply: Reply, spec: ReplySpec, *, name: str, weight: int | None) -> EvaluationAnswer:
    """Returns a checked reply as an answer.

    Args:
        reply: The checked reply.
        spec: What it was checked against.
        name: Name of the client.
        weight: Weight of the client, in examples; None for its own number.
    """
    sums = {each: reply.values(each) for each in spec.sums if each not in reply.undefined}
    measured = Measured(reply.num_examples, sums, reply.metrics, reply.undefined)
    return EvaluationAnswer(name, reply.num_examples if weight is None else weight, measured)


def pool(
    metric: Metric, answers: Sequence[EvaluationAnswer], *, limits: SumLimits | None
) -> Pooled:
    """Computes a metric over the clients on whose data it is defined.

    A metric whose values and sums are bounded needs no outlier check: a client can move its sums by
    no more than its share of the examples. Otherwise clients whose own value is far from those of
    all others are left out, and so are those whose unbounded sums are: a ratio of huge sums would
    decide the metric alone, whatever its own value is. Where all sums together have no value, those
    that have none of their own are left out.

    Args:
        metric: The metric.
        answers: One per client; not empty.
        limits: What one example can add to the metric's sums; None for a metric without sums.
    """
    values, reasons = [math.nan] * len(answers), [""] * len(answers)
    checked = not (metric.has_range and (limits is None or limits.bounded))
    for place, each in enumerate(answers):
        if metric.statistics is None or checked:
            values[place], reasons[place] = each.measured.judged(metric)
        else:
            reasons[place] = each.measured.undefined.get(metric.name, "")
    defined = [place for place, why in enumerate(reasons) if not why]
    far: dict[int, str] = {}
    if checked and defined:
        own = [(answers[place], values[place]) for place in defined]
        told = _outliers(metric, own, limits)
        far = {place: what for place, what in zip(defined, told, strict=True) if what}
    kept = [place for place in defined if place not in far]
    found = _over(metric, [answers[place] for place in kept]) if kept else (math.nan, "")
    if kept and found[1]:  # sums that no examples have, such as more hits than cases, may cause it
        own_reasons = {place: answers[place].measured.judged(metric)[1] for place in kept}
        sound = [place for place in kept if not own_reasons[place]]
        if sound and len(sound) < len(kept):
            found = _over(metric, [answers[place] for place in sound])
            reasons = [own_reasons.get(place, why) for place, why in enumerate(reasons)]
            kept = sound
    whys = [(answers[place].name, why) for place, why in enumerate(reasons) if why]
    first = min(whys)[1] if whys else ""  # by name: not by order of arrival
    source = MetricSource(
        clients=len(kept),
        asked=len(answers),
        undefined=len(whys),
        averaged=metric.statistics is None,
        reason=first,
    )
    value, reason = found if kept else (math.nan, first)
    return Pooled(value, reason, source, [(answers[place].name, far[place]) for place in far])


def _outliers(
    metric: Metric, own: Sequence[tuple[EvaluationAnswer, float]], limits: SumLimits | None
) -> list[str]:
    """Returns what of each answer, with its own value, is far from all others'; else empty."""
    values = np.array([value for _, value in own], np.float64)[:, None]
    of_values = outlying(values)
    of_sums = outlying(_unbounded_sums(metric, [answer for answer, _ in own], limits))
    return [
        f"{value:.4g}" if by_value else "its sums" if by_sums else ""
        for (_, value), by_value, by_sums in zip(own, of_values, of_sums, strict=True)
    ]


def _unbounded_sums(
    metric: Metric, answers: Sequence[EvaluationAnswer], limits: SumLimits | None
) -> NDArray[np.float64]:
    """Returns the magnitudes per example of the sums that nothing bounds, and their total.

    Shape ``(N, D)``; the total is there for sums that are zero on most clients.
    """
    if limits is None or limits.bounded:
        return np.zeros((len(answers), 1))
    free = ~np.isfinite(limits.low) | ~np.isfinite(limits.high)
    rows = [
        np.abs(each.measured.sums[metric.name][free]) / each.measured.examples for each in answers
    ]
    table = np.stack(rows)
    return np.concatenate([table, table.sum(axis=1, keepdims=True)], axis=1)


def _over(metric: Metric, answers: Sequence[EvaluationAnswer]) -> tuple[float, str]:
    """Returns the metric over all answers, with the reason if it is undefined."""
    if metric.statistics is not None:
        return value_of_sums(metric, exact_sum([weighted_sums(metric, each) for each in answers]))
    # Exact sums: the result must not depend on the order of the replies.
    total = sum(each.weight for each in answers)
    terms = (each.measured.values[metric.name] * each.weight for each in answers)
    return math.fsum(terms) / total, ""


def weighted_sums(metric: Metric, answer: EvaluationAnswer) -> FloatVector:
    """Returns a client's sums ``(K,)`` of a metric, as those of as many examples as it weighs."""
    sums, examples = answer.measured.sums[metric.name], answer.measured.examples
    return sums if answer.weight == examples else sums * (answer.weight / examples)
