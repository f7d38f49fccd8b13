"""Chooses how the clients of a model can be trained together, and keeps the group within memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from fedcore.client_app import Client, Resident
from fedcore.errors import DataError
from fedcore.model import FullModel
from fedcore.mods import client_mods
from fedcore.task import Loss, size_of
from fedcore.training.batches import gather
from server.simulation.chain import find_chain
from server.simulation.dense import train_dense
from server.simulation.slopes import is_mean
from server.simulation.vectorised import train_cohort, what_forbids
from server.simulation.work import LocalWork, Trained, in_order

_LOOKED_AT = 32  # examples that the loss and the model are tried on
_GROUP_BYTES = 256 << 20  # 256 MiB: inputs and weights of the clients that train together

Trainer = Callable[[FullModel, Sequence[LocalWork], float], Trained]
"""Trains clients side by side from one model, with FedProx's weight, in their order."""


def find_trainer(client: Client, resident: Resident, sample: LocalWork) -> Trainer | str:
    """What trains this task's clients side by side, or why nothing can.

    Args:
        client: The task and the run.
        resident: The task's model, on the device to train on.
        sample: What some client brings; the task's loss and model are tried on it.

    Raises:
        Exception: whatever the task's code raises on this client's data; another's may do.
    """
    run, model = client.run, resident.model
    assert client.task.loss is not None  # a Task sets it
    loss: Loss = client.task.loss
    if client_mods(run.federation.strategy):
        return f"clients of {run.federation.strategy} run a mod around their training, each its own"
    forbidden = what_forbids(model)
    if forbidden:
        return (
            f"the model holds {forbidden}: with buffers, frozen or tied weights, random layers or "
            "layers that mix examples it cannot be trained side by side with the result that a "
            "device would get"
        )
    rows = range(min(_LOOKED_AT, size_of(sample.examples)))
    inputs, targets = gather(sample.examples, rows)
    device = next(model.model.parameters()).device
    with torch.no_grad():
        behind = model.preprocess(inputs.to(device))
        outputs = model.model(behind)
    mean = is_mean(loss, outputs, targets.to(device))
    if mean is None:
        raise DataError("data: the loss of these examples is not finite. Others were tried.")
    if not mean:
        return "the task's loss is no mean over the examples of a batch"
    chain = find_chain(model.model, behind)
    if chain is not None:
        return lambda model, work, mu: train_dense(
            model, chain, work, loss, run.client, proximal_mu=mu
        )
    if run.private:
        return "per-example gradients of more than dense layers are taken one client at a time"
    return lambda model, work, mu: train_cohort(model, work, loss, run.client, proximal_mu=mu)


def train_in_groups(
    trainer: Trainer, model: FullModel, work: Sequence[LocalWork], client: Client, mu: float
) -> Trained:
    """Trains as many clients at once as memory is set aside for; results in the order of ``work``.

    Clients of like size go together, so that little is padded.
    """
    return in_order(
        (places, trainer(model, [work[place] for place in places], mu))
        for places in _groups(model, work, client)
    )


def _groups(model: FullModel, work: Sequence[LocalWork], client: Client) -> Iterator[list[int]]:
    weights = sum(p.numel() for p in model.model.parameters()) * 4 * 4  # gradients, state, noise
    epochs = client.run.client.epochs
    places = sorted(range(len(work)), key=lambda place: -size_of(work[place].examples))
    numbers = client.task.example_input.numel()
    group: list[int] = []
    each = 0
    for place in places:
        if not group:  # the largest of its group
            rows = size_of(work[place].examples) * epochs
            each = weights + 2 * rows * numbers * 4  # twice: a step's widest batch pads all
        group.append(place)
        if (len(group) + 1) * each > _GROUP_BYTES:
            yield group
            group = []
    if group:
        yield group
