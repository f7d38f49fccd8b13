"""The result of evaluating one model where the data are: `Evaluation`, its spread and its tables.

In: one `ClientScores` per client. Out: means with intervals, the spread over clients, the clients
with the worst results, as text or JSON.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy.special import stdtrit

from fedcore.config.run import RunConfig
from fedcore.observability.words import counted, epsilon_text, figure
from fedcore.privacy.evaluation_noise import evaluation_charge
from fedcore.privacy.ledger import Ledger
from fedcore.task.definition import Part
from fedcore.task.measured import Measured, value_of_sums
from fedcore.task.metrics import Metric
from fedcore.task.statistics import FloatVector, SumLimits, exact_sum

PARTS: Mapping[Part, str] = {
    "heldout": "examples that clients hold back from training",
    "test": "clients' own test data",
    "all": "all data of the clients, also what they may have trained on",
}
CONFIDENCE = 0.95
"""Two-sided confidence of the interval around a mean over clients."""
_WORST = 10  # clients in the table


@dataclass(frozen=True)
class ClientScores:
    """One client's measurements of a model.

    Example::

        worst = fedcore.evaluate(task, "run.toml", result.federated).worst(1)[0]
        worst.client, worst.examples, worst.metrics["accuracy"]
    """

    client: str
    examples: int
    metrics: Mapping[str, float]
    """Finite values by metric; a metric that is undefined on this client's data is left out."""
    undefined: Mapping[str, str] = field(default_factory=dict)
    """Reasons by metric, for metrics that are undefined on this client's data."""
    sums: Mapping[str, FloatVector] = field(default_factory=dict, compare=False, repr=False)
    """Sums that metrics are computed from, by metric, for the value over several clients."""

    @classmethod
    def of(
        cls,
        client: str,
        measured: Measured,
        metrics: Sequence[Metric],
        limits: SumLimits | None = None,
    ) -> ClientScores:
        """Returns the scores of a client from what was measured on its data.

        Args:
            client: Name of the client.
            measured: What it measured.
            metrics: The metrics in it.
            limits: Limits of sums with noise, if they have noise.
        """
        judged = {metric.name: measured.judged(metric) for metric in metrics}
        if limits is not None:
            (metric,) = metrics
            sums, examples = measured.sums[metric.name], measured.examples
            judged = {metric.name: noised_value(metric, sums, limits, examples)}
        return cls(
            client,
            measured.examples,
            {name: value for name, (value, why) in judged.items() if not why},
            {name: why for name, (_, why) in judged.items() if why},
            measured.sums,
        )


@dataclass(frozen=True)
class MetricSpread:
    """One metric over clients.

    Example::

        spread = fedcore.evaluate(task, "run.toml", result.federated).spread("accuracy")
        spread.mean, spread.margin, spread.low, spread.median
    """

    metric: str
    clients: int
    """Number of clients with a value."""
    examples: int
    """Number of their examples in total."""
    undefined: int
    """Number of clients on whose data the metric is undefined; they count for nothing here."""
    pooled: float | None
    """The value over all examples of all clients; None for a metric that is not computed from
    `fedcore.Statistics`, whose value over them is not known, or where it is undefined."""
    mean: float
    """Mean of the clients' values, weighted by number of examples."""
    margin: float | None
    """Half-width of the interval around ``mean`` at `CONFIDENCE`; None for a single client."""
    mean_of_clients: float
    """Unweighted mean of the clients' values."""
    deviation: float | None
    """Standard deviation over clients; None for a single client."""
    low: float
    tenth: float
    median: float
    high: float
    """Smallest value, 10 % quantile, median and largest value over clients."""


@dataclass(frozen=True)
class NoiseStatement:
    """The noise in clients' sums under example-level privacy, and what this evaluation cost."""

    noise_multiplier: float
    """Its deviation, over what one example can move the sums by."""
    epsilon: float
    """What one evaluation alone spends of each held-out example's budget."""
    target_delta: float
    limits: SumLimits = field(repr=False, compare=False)
    """Limits of the sums, and the noise's deviation."""

    @classmethod
    def of(cls, run: RunConfig, limits: SumLimits) -> NoiseStatement:
        """Returns the statement for one evaluation in a run that protects examples."""
        one, privacy = evaluation_charge(run, round=0, split=""), run.privacy
        epsilon = Ledger((one,)).epsilon(privacy)
        return cls(one.noise_multiplier, epsilon, privacy.target_delta, limits)

    def __str__(self) -> str:
        """Returns the statement as a line of text."""
        return (
            f"noise   multiplier {self.noise_multiplier:.4g} on each client's sums; epsilon "
            f"{epsilon_text(self.epsilon)} at delta {self.target_delta:g} for each held-out example"
        )


def noised_value(
    metric: Metric, sums: FloatVector, limits: SumLimits, examples: int
) -> tuple[float, str]:
    """Returns a metric's value for sums with noise, with the reason if it is undefined.

    Sums that noise has moved to where no examples have theirs are brought back to the limits.
    """
    value, why = value_of_sums(metric, sums)
    if not why:
        return value, why
    return value_of_sums(metric, np.clip(sums, limits.low * examples, limits.high * examples))


@dataclass(frozen=True)
class Evaluation:
    """One model, evaluated on the data of each client.

    Example::

        found = fedcore.evaluate(task, "run.toml", "runs/churn/global.safetensors")
        found.spread("accuracy").mean, found.worst(3)
        print(found)
    """

    model: str
    """What was evaluated: a file, or the kind of object."""
    sha256: str
    """Digest of the checkpoint or ONNX file."""
    part: Part
    """Which of the clients' examples were used."""
    metrics: tuple[Metric, ...]
    """The task's metrics; the first is the primary one."""
    clients: tuple[ClientScores, ...]
    """In order of their names."""
    failed: Mapping[str, str]
    """Reason by client, for clients that could not evaluate the model."""
    known: int
    """Number of clients that the task has; more than were asked if some were drawn."""
    noise: NoiseStatement | None = None
    """The noise in each client's sums; None where they are exact."""

    @property
    def primary(self) -> Metric:
        """The metric by which clients are ranked."""
        return self.metrics[0]

    def spread(self, metric: str) -> MetricSpread | None:
        """Returns a metric's distribution over clients; None if no client has a value."""
        measured = [
            (each.examples, each.metrics[metric]) for each in self.clients if metric in each.metrics
        ]
        undefined = len(self.clients) - len(measured)
        if not measured:
            return None
        return spread_of(metric, measured, undefined=undefined, pooled=self.pooled(metric))

    def pooled(self, metric: str) -> float | None:
        """Returns a metric over all examples of all clients; None where it is not known."""
        of = next((each for each in self.metrics if each.name == metric), None)
        rows = [each.sums[metric] for each in self.clients if metric in each.sums]
        if of is None or not rows:
            return None
        total = exact_sum(rows)
        value, why = value_of_sums(of, total)
        if self.noise is not None:
            examples = sum(each.examples for each in self.clients)
            value, why = noised_value(of, total, self.noise.limits, examples)
        return None if why else value

    def worst(self, count: int = _WORST) -> tuple[ClientScores, ...]:
        """Returns the clients with the worst primary metric, the worst first."""
        primary = self.primary
        sign = 1.0 if primary.higher_is_better else -1.0
        having = [each for each in self.clients if primary.name in each.metrics]
        having.sort(key=lambda each: (sign * each.metrics[primary.name], each.client))
        return tuple(having[:count])

    def as_json(self) -> dict[str, Any]:
        """Returns every figure as nested objects for JSON; what is not known is null."""
        return {
            "model": self.model,
            "sha256": self.sha256,
            "data": self.part,
            "primary": self.primary.name,
            "clients_known": self.known,
            "clients_asked": len(self.clients) + len(self.failed),
            "clients": len(self.clients),
            "examples": sum(each.examples for each in self.clients),
            "metrics": {
                metric.name: found.__dict__.copy() if (found := self.spread(metric.name)) else None
                for metric in self.metrics
            },
            "worst": [each.client for each in self.worst()],
            "by_client": [
                {
                    "client": each.client,
                    "examples": each.examples,
                    "metrics": dict(each.metrics),
                    "undefined": dict(each.undefined),
                }
                for each in self.clients
            ],
            "failed": dict(self.failed),
            "noise": None
            if self.noise is None
            else {
                "noise_multiplier": self.noise.noise_multiplier,
                "epsilon": self.noise.epsilon,
                "target_delta": self.noise.target_delta,
            },
        }

    def __str__(self) -> str:
        """Returns the evaluation as text: what was measured, each metric, the worst clients."""
        asked = len(self.clients) + len(self.failed)
        examples = sum(each.examples for each in self.clients)
        whom = f"{len(self.clients)} of {counted(asked, 'client')}"
        drawn = f", drawn from {self.known}" if asked < self.known else ""
        lines = [
            f"model   {self.model} (sha256 {self.sha256[:12]})",
            f"data    {counted(examples, 'example')} of {whom}{drawn}: {PARTS[self.part]}",
            *([str(self.noise)] if self.noise else []),
            "",
            *_aligned([_HEADINGS, *map(self._row, self.metrics)]),
        ]
        worst, name = self.worst(), self.primary.name
        if worst:
            rows = [[each.client, str(each.examples), figure(each.metrics[name])] for each in worst]
            shown = "every client" if len(worst) == len(self.clients) else f"{len(worst)} worst"
            lines += ["", f"{shown}, the worst first"]
            lines += _aligned([["client", "examples", name], *rows])
        undefined = [each for each in map(self._undefined, self.metrics) if each]
        if undefined or self.failed:
            lines.append("")
        lines += undefined
        if self.failed:
            client, reason = next(iter(self.failed.items()))
            lines.append(
                f"{counted(len(self.failed), 'client')} could not evaluate it. First: {client!r}: "
                f"{reason}"
            )
        return "\n".join(lines)

    def _row(self, metric: Metric) -> list[str]:
        found = self.spread(metric.name)
        if found is None:
            empty = [figure(None)] * (len(_HEADINGS) - 3)
            return [metric.name, figure(self.pooled(metric.name)), *empty, "0"]
        interval = figure(None)
        if found.margin is not None:
            low = max(found.mean - found.margin, metric.low)
            high = min(found.mean + found.margin, metric.high)
            interval = f"{figure(low)} to {figure(high)}"
        values = (found.deviation, found.low, found.tenth, found.median, found.high)
        means = [figure(found.pooled), figure(found.mean), interval]
        return [metric.name, *means, *map(figure, values), str(found.clients)]

    def _undefined(self, metric: Metric) -> str:
        count = sum(metric.name not in each.metrics for each in self.clients)
        if not count:
            return ""
        whys = [
            each.undefined[metric.name] for each in self.clients if metric.name in each.undefined
        ]
        because = f" ({whys[0]})" if whys else ""
        rest = "the other metrics alone"
        if metric.statistics is not None:
            rest = "its pooled value and the other metrics"
        return (
            f"{metric.name} is undefined on the data of {counted(count, 'client')}{because}, which "
            f"{'counts' if count == 1 else 'count'} for {rest}."
        )


_HEADINGS = [
    "metric",
    "pooled",
    "mean",
    "95 % interval",
    "sd",
    "lowest",
    "10 %",
    "median",
    "highest",
    "of",
]


def spread_of(
    metric: str,
    measured: Sequence[tuple[int, float]],
    *,
    undefined: int = 0,
    pooled: float | None = None,
) -> MetricSpread:
    """Computes the distribution of a metric over clients.

    Args:
        metric: Name of the metric.
        measured: Number of examples and value, one pair per client; not empty.
        undefined: Number of clients on whose data the metric is undefined.
        pooled: The metric over all examples of all clients, if known.
    """
    count, total = len(measured), sum(examples for examples, _ in measured)
    # Exact sums: the result must not depend on the order of the clients.
    mean = math.fsum(examples * value for examples, value in measured) / total
    values = np.array(sorted(value for _, value in measured))
    margin = None
    if count > 1:
        squares = math.fsum((examples * (value - mean)) ** 2 for examples, value in measured)
        error = math.sqrt(squares * count / (count - 1)) / total
        margin = float(stdtrit(count - 1, (1 + CONFIDENCE) / 2)) * error
    low, tenth, median, high = (float(np.quantile(values, q)) for q in (0.0, 0.1, 0.5, 1.0))
    return MetricSpread(
        metric=metric,
        clients=count,
        examples=total,
        undefined=undefined,
        pooled=pooled,
        mean=mean,
        margin=margin,
        mean_of_clients=math.fsum(values) / count,
        deviation=float(np.std(values, ddof=1)) if count > 1 else None,
        low=low,
        tenth=tenth,
        median=median,
        high=high,
    )


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Returns a table's rows as lines: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if place == 0 else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
