"""Mean and deviation of the inputs, from the cloud's data or from sums over all clients."""

from __future__ import annotations

import numpy as np
import torch
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid
from numpy.typing import NDArray

from fedcore.config import RunConfig
from fedcore.errors import ConfigError, InvalidUpdate, RoundFailed
from fedcore.model import FullModel, standardise_of
from fedcore.training.batches import in_order
from fedcore.training.evaluate import BATCH_SIZE
from fedcore.updates.messages import ARRAYS, CONFIG, STATISTICS, array_of, read_metrics
from server.cloud import CloudData
from server.inbound import reason_of

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
    target = standardise_of(model)
    if run.federation.normalisation == "federated":
        count, total, squares = _from_clients(grid, run, tuple(target.mean.shape))
    elif cloud is None:
        raise ConfigError(
            "federation.normalisation = 'cloud': the task has no cloud_data. Nothing was trained; "
            "use 'federated' or 'task', or give the task cloud_data."
        )
    else:
        count, total, squares = _from_cloud(model, cloud)
    mean = total / count
    deviation = np.sqrt(np.maximum(squares / count - np.square(mean), 0.0))
    constant = deviation < 1e-6 * np.maximum(1.0, np.abs(mean))
    deviation = np.where(constant, 1.0, deviation)  # a constant is only shifted
    target.mean.copy_(torch.from_numpy(mean))
    target.deviation.copy_(torch.from_numpy(deviation))


def _from_cloud(model: FullModel, cloud: CloudData) -> Sums:
    first = next(iter(model.preprocess.children()))
    with torch.inference_mode():
        values = torch.cat([first(x) for x, _ in in_order(cloud.train, BATCH_SIZE)]).double()
    return len(values), values.sum(0).numpy(), values.square().sum(0).numpy()


def _from_clients(grid: Grid, run: RunConfig, shape: tuple[int, ...]) -> Sums:
    nodes = sorted(grid.get_node_ids())
    messages = [Message(RecordDict({CONFIG: ConfigRecord()}), node, STATISTICS) for node in nodes]
    count, total, squares, answers = 0, np.zeros(()), np.zeros(()), 0
    reasons: list[str] = []
    replies = grid.send_and_receive(messages, timeout=run.federation.deadline_s)
    for reply in sorted(replies, key=lambda reply: reply.metadata.src_node_id):
        if reply.has_error():
            reasons.append(reason_of(reply))
            continue
        try:
            more, sums, squared = _read_sums(reply, shape)
        except InvalidUpdate as error:
            reasons.append(str(error))
            continue
        count, total, squares = count + more, total + sums, squares + squared
        answers += 1
    if not answers or answers < run.federation.quorum * len(nodes):
        raise RoundFailed(
            f"normalisation: {answers} of {len(nodes)} clients sent their sums, and "
            f"federation.quorum = {run.federation.quorum:g}. Nothing was trained. First: "
            f"{'; '.join(reasons[:1]) or 'no reply came before the deadline'}"
        )
    return count, total, squares


def _read_sums(reply: Message, shape: tuple[int, ...]) -> Sums:
    where = f"sums from node {reply.metadata.src_node_id}"
    count, _ = read_metrics(reply, where=where)
    try:
        record = reply.content.array_records[ARRAYS]
        total, squares = (array_of(record[name], where=where) for name in ("sum", "squares"))
    except KeyError as error:
        raise InvalidUpdate(f"{where}: no record {error}. They were not used.") from None
    for array in (total, squares):
        if array.shape != shape or array.dtype != np.float64 or not np.isfinite(array).all():
            raise InvalidUpdate(
                f"{where}: got {array.dtype} {array.shape}, expected finite float64 {shape}. They "
                "were not used; server and client must run the same task."
            )
    return count, total, squares
