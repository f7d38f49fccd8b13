"""Mean and deviation of the inputs, from the cloud's data or from sums over all clients."""

from __future__ import annotations

import numpy as np
import torch
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid
from numpy.typing import NDArray

from fedcore.client_app import STATISTICS
from fedcore.config import RunConfig
from fedcore.errors import ConfigError, RoundFailed
from fedcore.model import FullModel, standardise_of
from fedcore.training.batches import in_order
from fedcore.training.evaluate import BATCH_SIZE
from fedcore.updates.messages import ARRAYS, CONFIG, METRICS, NUM_EXAMPLES
from server.cloud import CloudData

Sums = tuple[int, NDArray[np.float64], NDArray[np.float64]]
"""Number of examples, sum and sum of squares by feature."""


def normalise(run: RunConfig, model: FullModel, grid: Grid, cloud: CloudData | None) -> None:
    """Sets the statistics in the model's preprocessing, as ``federation.normalisation`` says.

    Raises:
        ConfigError: it says ``cloud``, and the task has no cloud data.
        RoundFailed: it says ``federated``, and too few clients answered.
    """
    if run.federation.normalisation == "task":
        return
    if run.federation.normalisation == "federated":
        count, total, squares = _from_clients(grid, run)
    elif cloud is None:
        raise ConfigError(
            "federation.normalisation = 'cloud': the task has no cloud_data. Nothing was trained; "
            "use 'federated' or 'task', or give the task cloud_data."
        )
    else:
        count, total, squares = _from_cloud(model, cloud)
    mean = total / count
    deviation = np.sqrt(np.maximum(squares / count - np.square(mean), 0.0))
    deviation[deviation < 1e-6 * np.maximum(1.0, np.abs(mean))] = 1.0  # a constant stays as it is
    target = standardise_of(model)
    target.mean.copy_(torch.from_numpy(mean))
    target.deviation.copy_(torch.from_numpy(deviation))


def _from_cloud(model: FullModel, cloud: CloudData) -> Sums:
    first = next(iter(model.preprocess.children()))
    with torch.inference_mode():
        values = torch.cat([first(x) for x, _ in in_order(cloud.train, BATCH_SIZE)]).double()
    return len(values), values.sum(0).numpy(), values.square().sum(0).numpy()


def _from_clients(grid: Grid, run: RunConfig) -> Sums:
    nodes = sorted(grid.get_node_ids())
    messages = [Message(RecordDict({CONFIG: ConfigRecord()}), node, STATISTICS) for node in nodes]
    count, total, squares, answers = 0, np.zeros(()), np.zeros(()), 0
    reasons: list[str] = []
    replies = grid.send_and_receive(messages, timeout=run.federation.deadline_s)
    for reply in sorted(replies, key=lambda reply: reply.metadata.src_node_id):
        if reply.has_error():
            reasons.append(reply.error.reason or f"error {reply.error.code}")
            continue
        sums = reply.content.array_records[ARRAYS]
        count += int(str(reply.content.metric_records[METRICS][NUM_EXAMPLES]))
        total, squares = total + sums["sum"].numpy(), squares + sums["squares"].numpy()
        answers += 1
    if not answers or answers < run.federation.quorum * len(nodes):
        raise RoundFailed(
            f"normalisation: {answers} of {len(nodes)} clients sent their sums, and "
            f"federation.quorum = {run.federation.quorum:g}. Nothing was trained. First: "
            f"{'; '.join(reasons[:1]) or 'no reply came before the deadline'}"
        )
    return count, total, squares
