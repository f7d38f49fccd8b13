"""What the reply to each question may hold: the metrics and arrays that follow from the run."""

from __future__ import annotations

from collections.abc import Sequence

from flwr.app import MessageType

from fedcore.config.run import RunConfig
from fedcore.task.metrics import Metric
from fedcore.updates.messages import EPSILON, MODEL, STATISTICS, TRAIN_LOSS, UNCLIPPED
from fedcore.updates.pack import Layout
from fedcore.updates.replies import Form, Range, ReplySpec

SUM, SQUARES = "sum", "squares"
"""Names of the arrays with sums over a client's inputs."""
_MOST_EPSILON = 1e6  # what a policy can grant
_SLACK = 1e-6  # a share: epsilon is composed again on the device, in another order of sums
_NORM_BIT = "norm_bit"
_ADAPTIVE = "DifferentialPrivacyClientSideAdaptiveClipping"


def asked_to_train(run: RunConfig, layout: Layout) -> ReplySpec:
    """What an update of a model of this layout may hold."""
    # Where the run has no privacy of examples, an owner may ask for it, and its client reports it.
    most = run.privacy.max_epsilon * (1 + _SLACK) if run.private else _MOST_EPSILON
    metrics = {EPSILON: Range(0.0, most)}
    if not run.private and not run.client_private:  # whose loss stays on the client
        metrics[TRAIN_LOSS] = Range()
    if run.client_private and run.privacy.client.clip_norm == "adaptive":
        metrics[UNCLIPPED] = Range(0.0, 1.0)
    if run.federation.strategy == _ADAPTIVE:  # whose mod on the client reports it
        metrics[_NORM_BIT] = Range(0.0, 1.0)
    return ReplySpec(MessageType.TRAIN, metrics, {MODEL: Form("float32", (layout.size,))})


def asked_to_evaluate(metrics: Sequence[Metric]) -> ReplySpec:
    """What the reply of a client that evaluates must hold: each metric of the task."""
    ranges = {metric.name: Range(metric.low, metric.high) for metric in metrics}
    return ReplySpec(MessageType.EVALUATE, ranges, every_metric=True)


def asked_for_sums(shape: tuple[int, ...]) -> ReplySpec:
    """What the reply of a client that adds up its inputs must hold; ``shape`` is that of one."""
    form = Form("float64", shape)
    return ReplySpec(STATISTICS, arrays={SUM: form, SQUARES: form})
