"""Batched training of many clients whose model is a chain of dense layers and convolutions.

One matrix product over ten clients' batches uses a processor better than ten small ones. The
gradient of such a layer is a product of its input and its output's gradient, so no autograd graph
of the weights is built, and no hooks are needed for private training.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from fedcore.config.run import ClientConfig
from fedcore.errors import DataError
from fedcore.privacy.planning import expected_batch_size
from fedcore.task.definition import Loss
from fedcore.task.model import FullModel
from fedcore.training.per_example.chain import (
    Back,
    BatchGradients,
    Chain,
    Dense,
    PerExampleGradients,
    Run,
    Share,
    Weights,
    per_example_part,
    stacked,
    summed,
)
from fedcore.training.per_example.clipping import (
    Gradient,
    batch_gradient,
    clip_factors,
    example_gradients,
)
from fedcore.training.per_example.losses import example_losses
from fedcore.training.private import noise_deviation
from server.simulation.batched.dropout import DropForClients, DropoutStreams
from server.simulation.batched.optimizer import Descend, descent
from server.simulation.batched.rows import Rows, poisson_order, shuffled_order, stack_batches
from server.simulation.batched.work import LocalWork, TrainedClients, in_order


def train_chained(
    model: FullModel,
    chain: Chain,
    work: Sequence[LocalWork],
    loss: Loss,
    settings: ClientConfig,
    *,
    proximal_mu: float,
    run: Run,
) -> TrainedClients:
    """Trains one copy of ``model`` per client; ``work`` is either all private or all not.

    Guarantee:
        For losses that are means over examples, each result equals that of
        `fedcore.training.local.train`, or of `fedcore.training.private.train_private` with the same
        noise, on the same client, up to the order of float32 sums. Each private step is the same
        mechanism: each example's gradient over all layers is clipped to ``clip_norm`` before the
        sum, and noise with the plan's multiplier is added to the sum.

    Args:
        model: The global model, on the device to train on; not changed.
        chain: Chain of ``model.model``, from `find_chain`.
        work: Clients with at least one example each.
        loss: Mean loss over a batch.
        settings: Settings of local training.
        proximal_mu: Weight of FedProx's penalty; 0 without.
        run: Runs the chain; for private work, one that keeps per-example gradients apart.

    Source:
        Goodfellow 2015, arXiv:1510.01799 (norms of dense layers' gradients); Bu et al. 2023,
        arXiv:2210.00038 (one backward pass).
    """
    with torch.inference_mode(_is_one_layer(chain)):  # a single layer needs no autograd
        return _train(model, chain, work, loss, settings, proximal_mu, run)


def _is_one_layer(chain: Chain) -> bool:
    return len(chain.steps) == 1 and type(chain.steps[0].apply) is Dense


def _train(
    model: FullModel,
    chain: Chain,
    work: Sequence[LocalWork],
    loss: Loss,
    settings: ClientConfig,
    proximal_mu: float,
    run: Run,
) -> TrainedClients:
    private = work[0].private is not None
    orders = [poisson_order(one) if private else shuffled_order(one, settings) for one in work]
    places = sorted(range(len(work)), key=lambda place: -len(orders[place].lengths))
    group = [work[place] for place in places]
    device = next(model.model.parameters()).device
    rows = stack_batches(model, group, [orders[place] for place in places], device)
    start = {name: p.detach() for name, p in model.model.named_parameters()}
    weights = stacked(chain, start, len(work))
    descend = descent(weights, start, chain.layers, settings, proximal_mu)
    if private:
        _run_private_steps(rows, group, chain.layers, run, weights, loss, descend)
        losses: list[float | None] = [None] * len(work)
    else:
        generators = [one.layers() for one in group] if chain.drops else []
        losses = list(_run_steps(rows, run, weights, loss, descend, generators))
    flat = torch.cat([tensor.flatten(1) for tensor in weights.values()], dim=1)
    return in_order([(places, TrainedClients(flat, losses))])


def _run_steps(
    rows: Rows,
    run: Run,
    weights: Weights,
    loss: Loss,
    descend: Descend,
    generators: Sequence[torch.Generator],
) -> list[float]:
    """Runs all steps without privacy; returns each client's mean loss over its last pass.

    Dropout draws from the clients' ``generators``; there are none where nothing is dropped.

    The loss is NaN where some batch's was not finite, in any pass.
    """
    told: list[Tensor] = []
    shares = rows.mask / rows.counts.clamp(min=1).unsqueeze(2)
    for step, clients in enumerate(rows.active):
        counts = rows.counts[:clients, step].tolist() if generators else []
        streams = DropoutStreams(generators[:clients], counts, rows.widest[step])
        with DropForClients(streams) if generators else nullcontext():
            backward, losses, grads = _forward(rows, step, run, weights, loss)
        told.append(losses)
        if rows.full:
            grads.mul_(1 / rows.width)
        else:
            share = shares[:clients, step, : rows.widest[step]]
            grads.mul_(share.reshape(*share.shape, *[1] * (grads.dim() - 2)))
        layers = backward(grads)
        given = [_sum_over_batch(one) for one in layers]
        descend(clients, given, None)
    each = torch.zeros(rows.mask.shape, device=rows.mask.device)
    for step, losses in enumerate(told):
        each[: rows.active[step], step, : rows.widest[step]] = losses
    last = _last_pass(rows)
    each = torch.where(rows.mask > 0, each, 0.0)
    sums = torch.where(last.unsqueeze(2), each, 0.0).sum(dim=(1, 2))
    means = sums / (rows.counts * last).sum(dim=1)
    finite = torch.isfinite(each).all(dim=2).all(dim=1)  # in earlier epochs, too
    return torch.where(finite, means, torch.nan).tolist()


def _sum_over_batch(
    part: Share | BatchGradients | PerExampleGradients,
) -> Gradient | BatchGradients:
    """Returns a layer's gradient summed over whole batches."""
    if isinstance(part, PerExampleGradients):
        return summed(part)
    return part if isinstance(part, BatchGradients) else batch_gradient(*part)


def _last_pass(rows: Rows) -> Tensor:
    """Returns whether each step of each client is in its last pass, shape ``(K, T)``."""
    number = torch.arange(rows.counts.shape[1], device=rows.counts.device)
    counts = rows.step_counts.unsqueeze(1)
    return (number >= counts - rows.last_counts.unsqueeze(1)) & (number < counts)


def _run_private_steps(
    rows: Rows,
    group: Sequence[LocalWork],
    layers: Sequence[Dense],
    run: Run,
    weights: Weights,
    loss: Loss,
    descend: Descend,
) -> None:
    """Runs all steps of DP-SGD."""
    device = rows.inputs.device
    plans = [one.private.plan for one in group if one.private is not None]
    sizes = [expected_batch_size(one.size, plan) for one, plan in zip(group, plans, strict=True)]
    expected = torch.tensor(sizes, dtype=torch.float32, device=device)
    norms = torch.tensor([plan.clip_norm for plan in plans], device=device).unsqueeze(1)
    draw = _noise(group, weights, sizes)
    shares = rows.mask / expected[:, None, None]
    for step, clients in enumerate(rows.active):
        backward, _, grads = _forward(rows, step, run, weights, loss)
        each = []
        for layer, one in zip(layers, backward(grads), strict=True):
            each.append(example_gradients(per_example_part(one), bias=layer.bias is not None))
        if not all(bool(one.usable.all()) for one in each):
            raise DataError(
                "data: the gradient of some example is not finite. It is computed alone."
            )
        squares = torch.stack([one.squares for one in each]).sum(dim=0)
        scale = clip_factors(squares, norms[:clients]) * shares[:clients, step, : rows.widest[step]]
        descend(clients, [one.weighted(scale, slice(None)) for one in each], draw(clients))


def _forward(
    rows: Rows, step: int, run: Run, weights: Weights, loss: Loss
) -> tuple[Back, Tensor, Tensor]:
    """Runs the forward pass of a step, one batch per client.

    Returns:
        The backward pass, the examples' losses, and the losses' gradients with respect to the
        outputs.
    """
    clients = rows.active[step]
    columns = slice(step * rows.width, step * rows.width + rows.widest[step])
    all_of_them = clients == len(rows.inputs)
    now = weights if all_of_them else {name: one[:clients] for name, one in weights.items()}
    output, backward = run(now, rows.inputs[:clients, columns])
    losses, grads = example_losses(loss, output, rows.targets[:clients, columns])
    if not rows.full:  # a padding row's gradient may be NaN, which a factor of 0 would keep
        pads = rows.mask[:clients, step, : rows.widest[step]] == 0
        grads[pads] = 0
    return backward, losses, grads


def _noise(
    group: Sequence[LocalWork], weights: Weights, sizes: Sequence[int]
) -> Callable[[int], Weights]:
    """Returns a function that draws a step's noise for the first clients, in Opacus's order.

    The noise is already divided by the expected batch size, as the gradient is.
    """
    drawn = {name: tensor.new_empty(tensor.shape) for name, tensor in weights.items()}
    device = next(iter(drawn.values())).device
    draws = [
        (
            [tensor[place] for tensor in drawn.values()],
            noise_deviation(one.private.plan) / size,
            one.private.noise(device),
        )
        for place, (one, size) in enumerate(zip(group, sizes, strict=True))
        if one.private is not None
    ]

    def draw(clients: int) -> Weights:
        for tensors, deviation, rng in draws[:clients]:
            for tensor in tensors:
                tensor.normal_(0.0, deviation, generator=rng)
        return {name: tensor[:clients] for name, tensor in drawn.items()}

    return draw
