"""Trains a copy of any model for each of many clients."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fedcore.config.run import ClientConfig
from fedcore.task.definition import Loss
from fedcore.task.model import FullModel
from fedcore.training.local import optimizer_of
from fedcore.training.lone_rows import least_rows
from fedcore.training.order import ViewsOfAnyMemory, for_images
from fedcore.training.per_example.gradient_methods import trainable_parameters
from fedcore.training.per_example.losses import is_cross_entropy
from server.simulation.batched.dropout import DropoutStreams
from server.simulation.batched.optimizer import clip_each
from server.simulation.batched.rows import BatchOrder, check_alike, client_rows, shuffled_order
from server.simulation.batched.stacked.examples import mark
from server.simulation.batched.stacked.functions import RunForClients
from server.simulation.batched.stacked.supported import sizes_of
from server.simulation.batched.stacked.weights import NotStackable, StackedWeight
from server.simulation.batched.work import LocalWork, TrainedClients, in_order


def train_stacked(
    model: FullModel,
    work: Sequence[LocalWork],
    loss: Loss,
    settings: ClientConfig,
    *,
    proximal_mu: float,
    sizes: frozenset[int] | None = None,
) -> TrainedClients:
    """Trains one copy of ``model`` per client; returns results in the order of ``work``.

    Guarantee:
        Each result equals that of `fedcore.training.local.train` on the same client, up to the
        order of float32 sums, for models whose examples do not affect each other.

    Args:
        model: The global model, on the device to train on; not changed.
        work: Clients with at least one example each.
        loss: Loss over a batch, called for each client's batch by itself.
        settings: Settings of local training.
        proximal_mu: Weight of FedProx's penalty; 0 without.
        sizes: `Sizes.own` of the model; found by running it when None.

    Raises:
        NotStackable: the model cannot run for many clients at once.
    """
    orders = [
        shuffled_order(one, settings, least=_least_rows(model, one, loss, settings)) for one in work
    ]
    with for_images(model.model) as images:
        return in_order(
            (
                places,
                _train(
                    model,
                    [work[place] for place in places],
                    [orders[place] for place in places],
                    loss,
                    settings,
                    proximal_mu=proximal_mu,
                    sizes=sizes,
                    images=images,
                ),
            )
            for places in _groups(orders)
        )


def _least_rows(model: FullModel, one: LocalWork, loss: Loss, settings: ClientConfig) -> int:
    """Returns how many examples a batch of the client needs; the model itself needs one."""
    if is_cross_entropy(loss):
        return 1
    return least_rows(model, loss, one.examples, count=one.size, batch_size=settings.batch_size)


def _groups(orders: Sequence[BatchOrder]) -> Iterable[list[int]]:
    """Returns groups of clients with the same number of steps, as indices."""
    steps: dict[int, list[int]] = {}
    for place, one in enumerate(orders):
        steps.setdefault(len(one.lengths), []).append(place)
    return steps.values()


@dataclass(frozen=True)
class _Batch:
    """The examples of one step: the same number of rows for each client, padding at the end."""

    inputs: Tensor
    """``(K * B, ...)``."""
    targets: Tensor
    """``(K, B, ...)``."""
    counts: Sequence[int]
    """Examples of each client."""


def _train(
    model: FullModel,
    work: Sequence[LocalWork],
    orders: Sequence[BatchOrder],
    loss: Loss,
    settings: ClientConfig,
    *,
    proximal_mu: float,
    sizes: frozenset[int] | None,
    images: bool,
) -> TrainedClients:
    """Trains clients that all have the same number of steps."""
    device = next(model.model.parameters()).device
    data = [client_rows(model, one, device) for one in work]
    for one in data[1:]:
        check_alike(one, data[0])
    if sizes is None:
        sizes = sizes_of(model.model, data[0][0]).own
    trained = trainable_parameters(model.model)  # all clients share the frozen ones
    start = {name: p.detach() for name, p in trained.items()}
    weights = {
        name: p.new_empty((len(work), *p.shape)).copy_(p).requires_grad_()
        for name, p in start.items()
    }
    optimizer = optimizer_of(list(weights.values()), settings)
    generators = [one.layers() for one in work]
    rows = [torch.split(order.rows, list(order.lengths)) for order in orders]
    told: list[Tensor] = []
    model.model.train()
    for step in range(len(rows[0])):
        batch = _batch(data, [one[step] for one in rows], sizes)
        streams = DropoutStreams(generators, batch.counts, batch.targets.shape[1])
        mine = {name: StackedWeight(one) for name, one in weights.items()}
        values = _losses(model.model, mine, batch, loss, streams, images=images)
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(values.sum())
        if any(one.grad is not None for one in mine.values()):
            raise NotStackable("it hands its weights to an autograd function of its own")
        for name, weight in weights.items() if proximal_mu else ():
            pull = proximal_mu * (weight.detach() - start[name])
            weight.grad = pull if weight.grad is None else weight.grad.add_(pull)
        if settings.max_grad_norm is not None:
            found = [weight.grad for weight in weights.values() if weight.grad is not None]
            clip_each(found, settings.max_grad_norm)
        optimizer.step()
        told.append(values.detach())
    flat = torch.cat([weights[name].detach().flatten(1) for name in weights], dim=1)
    return TrainedClients(flat, _means(torch.stack(told, dim=1), orders))


def _means(losses: Tensor, orders: Sequence[BatchOrder]) -> list[float]:
    """Returns each client's mean loss over its last pass; NaN where one was not finite.

    Args:
        losses: Mean loss of each client's batches, ``(K, T)``.
        orders: The clients' batches.
    """
    finite = torch.isfinite(losses).all(dim=1)  # in earlier passes, too
    counts = torch.tensor([order.lengths for order in orders], device=losses.device)
    for row, order in zip(counts, orders, strict=True):
        row[: -order.last] = 0
    means = (losses * counts).sum(dim=1) / counts.sum(dim=1)
    return torch.where(finite, means, torch.nan).tolist()


def _batch(
    data: Sequence[tuple[Tensor, Tensor]], rows: Sequence[Tensor], sizes: frozenset[int]
) -> _Batch:
    """Joins the clients' batches.

    A function that gets a tensor must know whether its first dimension is the batch: the number of
    rows is raised until no other size can be taken for it.
    """
    counts = [len(one) for one in rows]
    width = max(counts)
    while any(size and size % (width * len(rows)) == 0 for size in sizes):
        width += 1
    # Padded with a row of the same batch: one that is not in it might overflow, and 0 * NaN is NaN.
    index = [torch.cat([one, one[:1].expand(width - len(one))]) for one in rows]
    inputs = torch.cat([x[own] for (x, _), own in zip(data, index, strict=True)])
    targets = torch.stack([y[own] for (_, y), own in zip(data, index, strict=True)])
    return _Batch(inputs, targets, counts)


def _losses(
    model: nn.Module,
    weights: Mapping[str, Tensor],
    batch: _Batch,
    loss: Loss,
    streams: DropoutStreams,
    *,
    images: bool,
) -> Tensor:
    """Returns each client's loss over its batch, ``(K,)``."""
    inputs = batch.inputs
    if images and inputs.dim() == 4:
        inputs = inputs.contiguous(memory_format=torch.channels_last)
    mark([inputs])
    with ViewsOfAnyMemory() if images else nullcontext(), RunForClients(streams):
        outputs = functional_call(model, dict(weights), (inputs,))
    if not isinstance(outputs, Tensor) or len(outputs) != len(inputs):
        raise NotStackable("its output has another number of rows than its input")
    each = outputs.view(len(batch.counts), streams.rows, *outputs.shape[1:])
    return torch.stack(
        [
            loss(output[:count], target[:count])
            for output, target, count in zip(each, batch.targets, batch.counts, strict=True)
        ]
    )
