"""One optimiser step on the stacked weights of many clients."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.optim.adam import adam
from torch.optim.sgd import sgd

from fedcore.config.run import ClientConfig
from fedcore.training.per_example.chain import (
    BatchGradients,
    Dense,
    Weights,
    matrix,
    reshape_to_weight,
)
from fedcore.training.per_example.clipping import Gradient

Descend = Callable[[int, Sequence[Gradient | BatchGradients], Weights | None], None]
"""Updates the weights of the first clients. Arguments: the number of clients, the gradient of
each layer in order, and tensors to add to the gradients, or None."""


def descent(
    weights: Weights,
    start: Weights,
    layers: Sequence[Dense],
    settings: ClientConfig,
    proximal_mu: float,
) -> Descend:
    """Returns a step function for stacked clients, with the optimiser that each client uses.

    For each client, the step equals that of `fedcore.training.local.make_optimizer`.

    Args:
        weights: ``(K, ...)`` each; changed in place by each step.
        start: Global weights, ``(...)`` each, for FedProx's penalty.
        layers: Layers of the model's chain.
        settings: Optimiser and its settings.
        proximal_mu: Weight of FedProx's penalty; 0 without.
    """
    if settings.optimizer == "sgd" and not settings.momentum and settings.max_grad_norm is None:
        return _plain(weights, start, layers, settings, proximal_mu)
    return _with_state(weights, start, layers, settings, proximal_mu)


def _plain(
    weights: Weights, start: Weights, layers: Sequence[Dense], settings: ClientConfig, mu: float
) -> Descend:
    """Returns a step of SGD without momentum, which fuses gradient and update in one product.

    Weight decay is a separate update: folded into the product, as a factor slightly below 1, it
    would lose precision to rounding.
    """
    rate, decay = settings.learning_rate, settings.weight_decay
    pulled = weights.items() if decay or mu else ()
    matrices = [matrix(layer, weights[layer.weight]) for layer in layers]

    def descend(
        clients: int, gradients: Sequence[Gradient | BatchGradients], extra: Weights | None
    ) -> None:
        pulls = {name: _pull(one[:clients], start[name], decay, mu) for name, one in pulled}
        for layer, whole, one in zip(layers, matrices, gradients, strict=True):
            if isinstance(one, BatchGradients):
                whole[:clients].sub_(one.weight, alpha=rate)
            else:
                weight = whole[:clients].view(clients, one.left.shape[2], -1)
                weight.baddbmm_(one.left.transpose(1, 2), one.right, alpha=-rate)
            if layer.bias is not None:
                weights[layer.bias][:clients].sub_(one.bias, alpha=rate)
        for name, tensor in weights.items():
            if name in pulls:
                tensor[:clients].sub_(pulls[name], alpha=rate)
            if extra is not None:
                tensor[:clients].sub_(extra[name], alpha=rate)

    return descend


def _pull(weight: Tensor, start: Tensor, decay: float, mu: float) -> Tensor:
    """Returns the gradients of weight decay and of FedProx's penalty."""
    grads = (weight - start).mul_(mu) if mu else torch.zeros_like(weight)
    return grads.add_(weight, alpha=decay) if decay else grads


def _with_state(
    weights: Weights, start: Weights, layers: Sequence[Dense], settings: ClientConfig, mu: float
) -> Descend:
    """Returns a step of any optimiser on whole gradients, with torch's functional optimisers."""
    first = {name: torch.zeros_like(tensor) for name, tensor in weights.items()}
    second = {name: torch.zeros_like(tensor) for name, tensor in weights.items()}
    steps = [torch.zeros(()) for _ in weights]

    def descend(
        clients: int, given: Sequence[Gradient | BatchGradients], extra: Weights | None
    ) -> None:
        gradients: Weights = {}
        for layer, one in zip(layers, given, strict=True):
            if isinstance(one, BatchGradients):
                products = one.weight
            else:
                products = torch.bmm(one.left.transpose(1, 2), one.right)
            gradients[layer.weight] = reshape_to_weight(
                layer, products, weights[layer.weight][:clients]
            )
            if layer.bias is not None:
                gradients[layer.bias] = one.bias
        for name, gradient in gradients.items():
            if extra is not None:
                gradient.add_(extra[name])
            if mu:
                gradient.add_(weights[name][:clients] - start[name], alpha=mu)
        if settings.max_grad_norm is not None:
            clip_each(list(gradients.values()), settings.max_grad_norm)
        now = [tensor[:clients] for tensor in weights.values()]
        slopes_of = [gradients[name] for name in weights]
        averages = [first[name][:clients] for name in weights]
        rate, decay = settings.learning_rate, settings.weight_decay
        if settings.optimizer != "sgd":  # torch's defaults, which clients use
            squares = [second[name][:clients] for name in weights]
            adam(
                now, slopes_of, averages, squares, [], steps, foreach=False, amsgrad=False,
                beta1=0.9, beta2=0.999, eps=1e-8, lr=rate, weight_decay=decay, maximize=False,
                decoupled_weight_decay=settings.optimizer == "adamw",
            )  # fmt: skip
        else:
            sgd(
                now, slopes_of, [*averages], foreach=False, momentum=settings.momentum, lr=rate,
                weight_decay=decay, dampening=0.0, nesterov=settings.nesterov, maximize=False,
            )  # fmt: skip

    return descend


def clip_each(gradients: Sequence[Tensor], max_norm: float) -> None:
    """Scales each client's gradients, ``(K, ...)`` each, to ``max_norm``, as torch does for one."""
    squares = torch.stack([one.flatten(1).square().sum(dim=1) for one in gradients])
    factors = (max_norm / (squares.sum(dim=0).sqrt() + 1e-6)).clamp(max=1.0)
    for one in gradients:
        one.mul_(factors.view(-1, *[1] * (one.dim() - 1)))
