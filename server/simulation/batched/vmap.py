"""Batched training of many clients with ``torch.func.vmap``, for any model that it supports.

Weights and batches of clients are stacked, and each operation runs once for all clients.
`server.simulation.batched.chained` is faster for chains of dense layers and convolutions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value
from torch.nn.modules.batchnorm import _BatchNorm

from fedcore.config.run import ClientConfig
from fedcore.task.definition import Loss
from fedcore.task.model import FullModel
from fedcore.training.batches import gather_all
from fedcore.training.local import optimizer_of
from fedcore.training.per_example.mapping import vmap
from server.simulation.batched.optimizer import clip_each
from server.simulation.batched.rows import check_alike
from server.simulation.batched.work import LocalWork, TrainedClients, in_order

Weights = dict[str, Tensor]


def unsupported_parts(model: FullModel) -> str:
    """Returns the parts of a model that prevent batched training; empty when there are none."""
    named = [
        f"{name or 'model'} ({type(module).__name__})"
        for name, module in model.model.named_modules()
        if list(module.buffers(recurse=False)) or isinstance(module, _RANDOM + _MIXING)
    ]
    before = [
        f"{name or 'preprocess'} ({type(module).__name__})"
        for name, module in model.preprocess.named_modules()
        if isinstance(module, _RANDOM + _MIXING)
    ]
    parameters = dict(model.model.named_parameters())
    frozen = [name for name, p in parameters.items() if not p.requires_grad]
    hooked = [f"{name} (with hooks)" for name, p in parameters.items() if p._backward_hooks]
    hooked += [
        f"{name or 'model'} (with hooks)"
        for name, module in model.model.named_modules()
        if module._backward_hooks or module._backward_pre_hooks
    ]
    tied = sorted(model.model.state_dict().keys() - parameters.keys()) if not named else []
    return ", ".join(named + before + frozen + hooked + [f"{name} (tied)" for name in tied])


_MIXING = (_BatchNorm,)  # with or without running statistics
_RANDOM = (nn.modules.dropout._DropoutNd, nn.RReLU, nn.FractionalMaxPool2d, nn.FractionalMaxPool3d)


def train_cohort(
    model: FullModel,
    work: Sequence[LocalWork],
    loss: Loss,
    settings: ClientConfig,
    *,
    proximal_mu: float,
) -> TrainedClients:
    """Trains one copy of ``model`` per client; returns results in the order of ``work``.

    Guarantee:
        For losses that are means over examples, each result equals that of
        `fedcore.training.local.train` on the same client, up to the order of float32 sums.

    Args:
        model: The global model, on the device to train on; not changed.
        work: Clients with at least one example each.
        loss: Mean loss over a batch.
        settings: Settings of local training.
        proximal_mu: Weight of FedProx's penalty; 0 without.
    """
    return in_order(
        (places, _train(model, [work[place] for place in places], loss, settings, proximal_mu))
        for places in _groups(work, settings)
    )


def _groups(work: Sequence[LocalWork], settings: ClientConfig) -> Iterable[list[int]]:
    """Returns groups of clients with the same number of steps, as indices."""
    steps: dict[int, list[int]] = {}
    for place, one in enumerate(work):
        steps.setdefault(-(-one.size // settings.batch_size), []).append(place)
    return steps.values()


def _train(
    model: FullModel,
    work: Sequence[LocalWork],
    loss: Loss,
    settings: ClientConfig,
    proximal_mu: float,
) -> TrainedClients:
    """Trains clients that all have the same number of steps."""
    clients, batch = len(work), settings.batch_size
    device = next(model.model.parameters()).device
    counts = torch.tensor([one.size for one in work], device=device)
    steps = -(-int(counts[0]) // batch)
    inputs, targets = _stacked_batches(model, work, steps * batch)
    valid = torch.arange(steps * batch, device=device) < counts[:, None]
    full = bool(valid.all())
    weights, start = _stacked(model.model, clients)
    optimizer = optimizer_of(list(weights.values()), settings)
    step = _gradients(model.model, loss, full=full)
    rows = torch.arange(clients)[:, None]
    losses = torch.zeros(clients, device=device)
    finite = torch.ones(clients, dtype=torch.bool, device=device)
    model.model.train()
    rngs = [one.order() for one in work]
    left = settings.steps_of(int(counts[0]))
    seen = counts
    while left:
        order = _orders(work, rngs, steps * batch)
        losses, seen = torch.zeros(clients, device=device), torch.zeros_like(counts)
        for first in range(0, min(steps, left) * batch, batch):
            places = slice(first, first + batch)
            picked, mask = order[:, places], valid[:, places]
            gradients, value = step(weights, inputs[rows, picked], targets[rows, picked], mask)
            for name, weight in weights.items():
                gradient = gradients[name]
                if proximal_mu:
                    gradient = gradient + proximal_mu * (weight.detach() - start[name])
                weight.grad = gradient
            if settings.max_grad_norm is not None:
                clip_each(_gradients_of(weights), settings.max_grad_norm)
            optimizer.step()
            losses += value.detach() * mask.sum(dim=1)
            seen += mask.sum(dim=1)
            finite &= torch.isfinite(value.detach())
        left -= min(steps, left)
    flat = torch.cat([weights[name].detach().flatten(1) for name in weights], dim=1)
    means = torch.where(finite, losses / seen, torch.nan)
    return TrainedClients(flat, means.tolist())


def _gradients_of(weights: Weights) -> list[Tensor]:
    return [weight.grad for weight in weights.values() if weight.grad is not None]


def _stacked_batches(
    model: FullModel, work: Sequence[LocalWork], length: int
) -> tuple[Tensor, Tensor]:
    """Returns all clients' examples, preprocessed, padded and stacked: ``(K, length, ...)``."""
    inputs: list[Tensor] = []
    targets: list[Tensor] = []
    device = next(model.model.parameters()).device
    with torch.no_grad():
        for one in work:
            count = one.size
            x, y = (tensor.to(device) for tensor in gather_all(one.examples))
            x = model.preprocess(x)
            padding = torch.zeros(length - count, dtype=torch.long)  # the first example, masked out
            rows = torch.cat([torch.arange(count), padding])
            if inputs:
                check_alike((x, y), (inputs[0], targets[0]))
            inputs.append(x[rows])
            targets.append(y[rows])
    return torch.stack(inputs), torch.stack(targets)


def _orders(work: Sequence[LocalWork], rngs: Sequence[torch.Generator], length: int) -> Tensor:
    """Returns one epoch's order for each client, ``(K, length)``, with padding at the end."""
    orders = torch.zeros(len(work), length, dtype=torch.long)
    for row, one, rng in zip(orders, work, rngs, strict=True):
        drawn = torch.randperm(one.size, generator=rng)
        row[: len(drawn)] = drawn
    return orders


def _stacked(model: nn.Module, clients: int) -> tuple[Weights, Weights]:
    """Returns a copy of the weights for each client, ``(K, ...)``, and the global weights."""
    start = {name: p.detach() for name, p in model.named_parameters()}
    copies = {
        name: p.unsqueeze(0).expand(clients, *p.shape).clone().requires_grad_()
        for name, p in start.items()
    }
    return copies, start


Step = Callable[[Weights, Tensor, Tensor, Tensor], tuple[Weights, Tensor]]


def _gradients(model: nn.Module, loss: Loss, *, full: bool) -> Step:
    """Returns a function for the gradients and losses of one batch per client."""

    def objective(weights: Weights, inputs: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
        outputs = functional_call(model, weights, (inputs,))
        if full:
            return loss(outputs, targets)
        each = vmap(lambda one, target: loss(one.unsqueeze(0), target.unsqueeze(0)))
        losses: Tensor = each(outputs, targets)
        return (losses * mask).sum() / mask.sum()

    side_by_side: Step = vmap(grad_and_value(objective))
    return side_by_side
