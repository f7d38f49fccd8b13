"""Mean and deviation of the inputs, from the cloud's data or from sums over all that train.

`normalise` computes both before the first round and stores them in the model's preprocessing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid
from numpy.typing import NDArray

from fedcore.config.run import RunConfig
from fedcore.errors import ConfigError, DataError, InvalidUpdate, RoundFailed
from fedcore.observability.words import counted
from fedcore.task.model import FullModel, standardise_of
from fedcore.training.batches import in_order
from fedcore.training.evaluate import BATCH_SIZE
from fedcore.updates.messages import CONFIG, STATISTICS
from fedcore.updates.replies import read_reply
from server.cloud import CloudData
from server.rounds.expected import SQUARES, SUM, sums_spec
from server.rounds.inbound import failure_of
from server.rounds.outliers import DOMINATES, MAX_SPREADS, MIN_CLIENTS
from server.rounds.peers import Peers
from server.rounds.roles import Roles

Sums = tuple[int, NDArray[np.float64], NDArray[np.float64]]
"""Number of examples, and sum and sum of squares of each feature."""
_LARGEST_INPUT = 1e12
"""Largest magnitude of a statistic that devices accept, so none larger is computed."""
_SLACK, _TINY = 1e-6, 1e-300  # tolerances for rounding in the clients' sums
_NAMED = 5  # names shown in a note


def normalise(
    run: RunConfig,
    model: FullModel,
    grid: Grid,
    cloud: CloudData | None,
    peers: Peers,
    roles: Roles,
    on_note: Callable[[str], None],
) -> None:
    """Sets mean and deviation in the model's preprocessing, from ``federation.normalisation``.

    Rejects sums that no valid inputs have, and leaves out clients whose inputs are outliers, named
    with ``on_note``. Outliers cannot be identified among fewer than three clients.

    Raises:
        ConfigError: the setting is ``cloud``, and the task has no cloud data.
        DataError: the setting is ``cloud``, and the cloud's data are not finite.
        RoundFailed: the setting is ``federated``, and too few clients sent valid sums.
    """
    if run.federation.normalisation == "task":
        return
    target = standardise_of(model)
    if run.federation.normalisation == "federated":
        nodes = sorted(roles.training(grid.get_node_ids()))  # judges must be unseen clients
        shape = tuple(target.mean.shape)
        count, total, squares = _from_clients(grid, nodes, run, shape, peers, on_note)
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
    deviation = np.where(constant, 1.0, deviation)  # only centre a constant feature
    target.mean.copy_(torch.from_numpy(mean))
    target.deviation.copy_(torch.from_numpy(deviation))


def _from_cloud(model: FullModel, cloud: CloudData) -> Sums:
    first = next(iter(model.preprocess.children()))
    with torch.inference_mode():
        values = torch.cat([first(x) for x, _ in in_order(cloud.train, BATCH_SIZE)]).double()
    usable = values.flatten(1).abs() <= _LARGEST_INPUT  # false for NaN, too
    if not usable.all():
        row = int((~usable.all(dim=1)).nonzero()[0])
        raise DataError(
            f"normalisation: example {row} of the cloud's training data has values that are NaN or "
            f"larger than {_LARGEST_INPUT:g} after the task's preprocessing, and would spoil mean "
            "and deviation for every client. Nothing was trained; correct the cloud's data "
            "(cloud_data of the task), or use federation.normalisation = 'federated'."
        )
    return len(values), values.sum(0).numpy(), values.square().sum(0).numpy()


def _from_clients(
    grid: Grid,
    nodes: Sequence[int],
    run: RunConfig,
    shape: tuple[int, ...],
    peers: Peers,
    on_note: Callable[[str], None],
) -> Sums:
    """Returns sums over the clients of ``nodes`` except outliers."""
    messages = [Message(RecordDict({CONFIG: ConfigRecord()}), node, STATISTICS) for node in nodes]
    found: list[tuple[str, Sums]] = []
    reasons: list[str] = []
    replies = grid.send_and_receive(messages, timeout=run.federation.deadline_s)
    for reply in sorted(replies, key=lambda reply: reply.metadata.src_node_id):
        node = reply.metadata.src_node_id
        if reply.has_error():
            reasons.append(peers.failure_text(node, failure_of(reply)[1]))
            continue
        try:
            found.append((peers.name(node), _read_sums(reply, shape, peers.name(node))))
        except InvalidUpdate as error:
            peers.rejected(node, str(error))
            reasons.append(str(error))
    far = _outlying([sums for _, sums in found])
    kept = [sums for (_, sums), out in zip(found, far, strict=True) if not out]
    if far.any():
        named = [name for (name, _), out in zip(found, far, strict=True) if out]
        on_note(
            "normalisation: excludes the inputs of "
            f"{', '.join(named[:_NAMED])}{', ...' if len(named) > _NAMED else ''}, which are far "
            f"from those of the other {counted(len(kept), 'client')}. Check their data."
        )
    if not kept or len(kept) < run.federation.quorum * len(nodes):
        raise RoundFailed(
            f"normalisation: {len(kept)} of {counted(len(nodes), 'client')} sent usable sums, "
            f"but federation.quorum = {run.federation.quorum:g}. Nothing was trained. First: "
            f"{'; '.join(reasons[:1]) or 'no reply arrived before the deadline'}"
        )
    if reasons:
        on_note(
            f"normalisation: without {len(reasons)} of {counted(len(nodes), 'client')}, whose sums "
            f"could not be used. First: {reasons[0]}"
        )
    count, total, squares = kept[0]
    for more, sums, squared in kept[1:]:
        count, total, squares = count + more, total + sums, squares + squared
    return count, total, squares


def _outlying(found: Sequence[Sums]) -> NDArray[np.bool_]:
    """Returns which clients' inputs are outliers, or would determine the result by themselves.

    An outlier has a mean or root mean square, in any feature, far from the others' on the scale of
    the median root mean square. So a feature centred at zero has a scale, too; a feature that is
    zero for most clients has that of the largest feature. A client determines the result if leaving
    it out would change the result much: a client may have most of the examples if they resemble the
    others'.
    """
    if len(found) < MIN_CLIENTS:
        return np.zeros(len(found), np.bool_)
    counts = np.array([[count] for count, _, _ in found], np.float64)
    totals = np.array([total.ravel() for _, total, _ in found])
    squares = np.array([squared.ravel() for _, _, squared in found])
    means, sizes = totals / counts, np.sqrt(squares / counts)
    usual = np.median(sizes, axis=0)
    usual = np.where(usual > 0, usual, usual.max(initial=0.0))
    away = np.maximum(np.abs(means - np.median(means, axis=0)), sizes)
    far = np.logical_and(away > MAX_SPREADS * usual, usual > 0).any(axis=1, keepdims=True)
    kept = np.where(far, 0.0, counts)
    others = kept.sum() - kept
    total, squared = (np.where(far, 0.0, one) for one in (totals, squares))
    with np.errstate(divide="ignore", invalid="ignore"):  # a single client is left
        mean, size = total.sum(axis=0) / kept.sum(), np.sqrt(squared.sum(axis=0) / kept.sum())
        without = (total.sum(axis=0) - total) / others
        size_without = np.sqrt(np.maximum(squared.sum(axis=0) - squared, 0.0) / others)
    moved = np.maximum(np.abs(mean - without), np.abs(size - size_without))
    decides = np.logical_and(moved > DOMINATES * usual, usual > 0).any(axis=1, keepdims=True)
    out: NDArray[np.bool_] = np.logical_or(far, decides)[:, 0]
    return out


def _read_sums(reply: Message, shape: tuple[int, ...], name: str) -> Sums:
    """Returns a client's number of examples, sums and sums of squares, checked.

    Raises:
        InvalidUpdate: no inputs of a magnitude that training supports have such sums.
    """
    where = f"sums from {name}"
    read = read_reply(reply, sums_spec(shape), where=where)
    count, total, squares = read.num_examples, read.values(SUM), read.values(SQUARES)
    if not (squares >= 0).all() or not (squares <= count * _LARGEST_INPUT**2).all():
        raise InvalidUpdate(
            f"{where}: sums of squares from {squares.min():.3g} to {squares.max():.3g} over "
            f"{counted(count, 'example')}, expected inputs of magnitude up to {_LARGEST_INPUT:g}. "
            "They were not used."
        )
    if not (np.abs(total) <= np.sqrt(count * squares) * (1 + _SLACK) + _TINY).all():
        raise InvalidUpdate(
            f"{where}: its sums are larger than its sums of squares allow, which is impossible "
            "for any inputs. They were not used."
        )
    return count, total, squares
