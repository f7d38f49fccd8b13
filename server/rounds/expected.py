"""Specifications of valid replies: the metrics and arrays that each request allows."""

from __future__ import annotations

from collections.abc import Sequence

from flwr.app import MessageType

from fedcore.config.run import RunConfig
from fedcore.errors import TaskError
from fedcore.privacy.contributions import noised_limits
from fedcore.task.metrics import Metric
from fedcore.task.statistics import MAX_SUMS
from fedcore.updates.messages import EPSILON, MODEL, STATISTICS, TRAIN_LOSS, UNCLIPPED
from fedcore.updates.pack import Layout
from fedcore.updates.replies import ArraySpec, Range, ReplySpec

SUM, SQUARES = "sum", "squares"
"""Names of the arrays with a client's sums and sums of squares over its inputs."""
_MAX_EPSILON = 1e6  # the most that an owner's policy can allow
_SLACK = 1e-6  # relative: a device adds up epsilon in another order
_NORM_BIT = "norm_bit"
_ADAPTIVE = "DifferentialPrivacyClientSideAdaptiveClipping"


def update_spec(run: RunConfig, layout: Layout) -> ReplySpec:
    """Returns the specification of an update for a model of this layout."""
    # An owner may require example-level privacy where the run does not; the client reports epsilon.
    most = run.privacy.max_epsilon * (1 + _SLACK) if run.private else _MAX_EPSILON
    metrics = {EPSILON: Range(0.0, most)}
    if not run.private and not run.client_private:  # under privacy the loss stays on the client
        metrics[TRAIN_LOSS] = Range()
    if run.client_private and run.privacy.client.clip_norm == "adaptive":
        metrics[UNCLIPPED] = Range(0.0, 1.0)
    if run.federation.strategy == _ADAPTIVE:  # the strategy's mod on the client reports it
        metrics[_NORM_BIT] = Range(0.0, 1.0)
    weights = {MODEL: ArraySpec("float32", (layout.size,), layout.whole)}
    return ReplySpec(MessageType.TRAIN, metrics, weights)


def evaluation_of(run: RunConfig, metrics: Sequence[Metric], outputs: tuple[int, ...]) -> ReplySpec:
    """Returns the specification of an evaluation reply in a run.

    It is `evaluation_spec`; under example-level privacy only the primary metric's sums are allowed,
    with noise.

    Args:
        run: The run.
        metrics: Those of the task.
        outputs: Shape of the model's outputs for one example.

    Raises:
        ConfigError: no noise fits the primary metric.
        TaskError: the limits of a metric's sums are not usable, or there are too many sums.
    """
    if not run.private:
        return evaluation_spec(metrics, outputs)
    primary = metrics[0]
    noised = {primary.name: noised_limits(run, primary, outputs)}
    return ReplySpec(MessageType.EVALUATE, sums=noised)


def evaluation_spec(metrics: Sequence[Metric], outputs: tuple[int, ...]) -> ReplySpec:
    """Returns the specification of an evaluation reply: every metric of the task.

    Args:
        metrics: Those of the task. One with statistics arrives as sums, another as a value.
        outputs: Shape of the model's outputs for one example, which limits sums.

    Raises:
        TaskError: the limits of a metric's sums are not usable, or there are too many sums.
    """
    sums = {
        each.name: each.statistics.limits_for(outputs, name=each.name)
        for each in metrics
        if each.statistics is not None
    }
    count = sum(len(each.low) for each in sums.values())
    if count > MAX_SUMS:
        raise TaskError(
            f"metrics: their statistics have {count} sums for outputs of shape {outputs}, expected "
            f"at most {MAX_SUMS} together. Nothing was evaluated; use fewer bins or metrics."
        )
    ranges = {each.name: Range(each.low, each.high) for each in metrics if each.statistics is None}
    return ReplySpec(MessageType.EVALUATE, ranges, sums=sums, every_metric=True)


def sums_spec(shape: tuple[int, ...]) -> ReplySpec:
    """Returns the specification of a reply with sums over inputs of ``shape``."""
    form = ArraySpec("float64", shape)
    return ReplySpec(STATISTICS, arrays={SUM: form, SQUARES: form})
