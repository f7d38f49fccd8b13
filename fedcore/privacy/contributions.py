"""What one held-out example can add to the sums of an evaluation, which noise must cover.

A client evaluates a model by adding up what each example contributes to the primary metric's sums.
`ContributionBounds` says how large a contribution can be; noise of that size, times a multiplier
(`fedcore.privacy.evaluation_noise`), makes the sums private. Clients, and the server that checks
what they say, use the same functions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from fedcore.errors import ConfigError
from fedcore.privacy.evaluation_noise import evaluation_noise
from fedcore.task.statistics import FloatVector, SumLimits

if TYPE_CHECKING:
    from fedcore.config.run import RunConfig
    from fedcore.task.metrics import Metric

LARGEST_CONTRIBUTION = 1e9
"""Largest part of one example in a sum that counts as bounded; metrics of numbers without bounds
declare more, and need a limit in ``privacy.evaluation_limits``."""


@dataclass(frozen=True)
class ContributionBounds:
    """What one example can add to the sums of a metric, shape ``(K,)`` each.

    Guarantee:
        A contribution that `clipped` returns lies between ``low`` and ``high``, and divided by
        ``scale`` has an L2 norm of at most ``norm``.
    """

    low: FloatVector = field(repr=False)
    high: FloatVector = field(repr=False)
    scale: FloatVector = field(repr=False)
    """The largest magnitude of a contribution to each sum; 1 where that is zero."""
    norm: float

    def clipped(self, contribution: FloatVector) -> FloatVector:
        """Returns one example's contribution, shape ``(K,)``, within the bounds and over ``scale``.

        One that is not finite counts as zero.
        """
        if contribution.shape != self.scale.shape or not np.isfinite(contribution).all():
            return np.zeros_like(self.scale)
        shares: FloatVector = np.clip(contribution, self.low, self.high) / self.scale
        length = float(np.linalg.norm(shares))
        return shares * (self.norm / length) if length > self.norm else shares

    def deviations(self, noise_multiplier: float) -> FloatVector:
        """Returns the standard deviation of the noise on each sum, shape ``(K,)``."""
        return noise_multiplier * self.norm * self.scale


def contribution_bounds(
    metric: Metric, limits: SumLimits, run_limits: Mapping[str, float]
) -> ContributionBounds:
    """Returns the bounds on one example's part in a metric's sums.

    Args:
        metric: The metric.
        limits: What the metric declares for the model's outputs.
        run_limits: ``privacy.evaluation_limits``: by metric, the most that an example may add to
            any of its sums. What it would add beyond that is cut off.

    Raises:
        ConfigError: nothing bounds them.
    """
    cap = run_limits.get(metric.name, math.inf)
    low, high = np.maximum(limits.low, -cap), np.minimum(limits.high, cap)
    scale = np.maximum(np.abs(low), np.abs(high))
    if not float(scale.max()) <= LARGEST_CONTRIBUTION:
        raise ConfigError(
            f"metric {metric.name!r}: one example may add up to {float(scale.max()):.3g} to its "
            "sums, and under privacy clients' noise must cover that. Nothing was run; set "
            f"privacy.evaluation_limits.{metric.name} to a value that few examples exceed (for an "
            "RMSE the square of a large error), or federation.evaluate_cohort and "
            "federation.holdout to 0, so that the cloud's data judge alone."
        )
    scale = np.where(scale > 0, scale, 1.0)
    together = min(limits.total, float(np.abs(scale).sum()))
    norm = min(math.sqrt(len(scale)), max(together / float(scale.min()), _LEAST_NORM))
    return ContributionBounds(low, high, scale, norm)


_LEAST_NORM = 1e-6  # a norm of zero would leave no noise where a metric's limits are wrong


def statistics_limits(metric: Metric, outputs: tuple[int, ...]) -> SumLimits:
    """Returns what one example adds to a metric's sums.

    Raises:
        ConfigError: the metric is not computed from sums.
        TaskError: its limits are not usable.
    """
    if metric.statistics is None:
        raise ConfigError(
            f"metric {metric.name!r} is a function of all outputs at once, to which no noise can "
            "be fitted. Nothing was run; under privacy, make the primary metric one of "
            "fedcore.Statistics, or set federation.evaluate_cohort and federation.holdout to 0, so "
            "that the cloud's data judge alone."
        )
    return metric.statistics.limits_for(outputs, name=metric.name)


def noised_limits(run: RunConfig, metric: Metric, outputs: tuple[int, ...]) -> SumLimits:
    """Returns the limits of a metric's noised sums, for the server that receives them.

    Raises:
        ConfigError: nothing bounds what one example adds.
        TaskError: the metric's limits are not usable.
    """
    limits = statistics_limits(metric, outputs)
    bounds = contribution_bounds(metric, limits, run.privacy.evaluation_limits)
    noise = bounds.deviations(evaluation_noise(run))
    return SumLimits(bounds.low, bounds.high, math.inf, noise)
