"""Training without privacy: the loop that clients, pruning and cloud processes share."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Protocol

import torch
from torch import Tensor, nn

from fedcore.errors import TrainingDiverged
from fedcore.task.definition import Examples, Loss
from fedcore.training.batches import shuffled
from fedcore.training.order import ViewsOfAnyMemory, for_images


class OptimizerSettings(Protocol):
    """What ``[client]`` and ``[finetune]`` have in common."""

    @property
    def optimizer(self) -> str: ...
    @property
    def learning_rate(self) -> float: ...
    @property
    def momentum(self) -> float: ...
    @property
    def weight_decay(self) -> float: ...


def make_optimizer(module: nn.Module, settings: OptimizerSettings) -> torch.optim.Optimizer:
    """The optimiser that a section of the configuration names."""
    return optimizer_of([p for p in module.parameters() if p.requires_grad], settings)


def optimizer_of(
    parameters: Sequence[Tensor], settings: OptimizerSettings
) -> torch.optim.Optimizer:
    """The same, for parameters that are no module's."""
    if settings.optimizer == "adam":
        return torch.optim.Adam(
            parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay
        )
    return torch.optim.SGD(
        parameters,
        lr=settings.learning_rate,
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
    )


def train(
    module: nn.Module,
    examples: Examples,
    loss: Loss,
    settings: OptimizerSettings,
    *,
    epochs: int,
    batch_size: int,
    rng: torch.Generator,
    penalty: Callable[[nn.Module], Tensor] | None = None,
    between: Callable[[], None] | None = None,
) -> float:
    """Trains ``module`` in place and returns the mean loss over the last epoch.

    Args:
        module: On the device to train on.
        examples: Local data.
        loss: Mean loss over a batch.
        settings: The optimiser's.
        epochs: Passes over the data.
        batch_size: Examples a step.
        rng: Fixes the order of examples.
        penalty: Added to each batch's loss, as FedProx's proximal term.
        between: Called before each step; what it raises ends the work.

    Raises:
        TrainingDiverged: a batch's loss is not finite; ``module`` is then not to be used.
    """
    device = next(module.parameters()).device
    optimizer = make_optimizer(module, settings)
    module.train()
    mean = 0.0
    with for_images(module) as images:
        views = ViewsOfAnyMemory() if images else nullcontext()
        for epoch in range(epochs):
            total, count = torch.zeros((), device=device), 0
            for inputs, targets in shuffled(examples, batch_size, rng):
                if between is not None:
                    between()
                optimizer.zero_grad(set_to_none=True)
                inputs = inputs.to(device)
                if images and inputs.dim() == 4:
                    inputs = inputs.contiguous(memory_format=torch.channels_last)
                with views:
                    value = loss(module(inputs), targets.to(device))
                objective = value + penalty(module) if penalty else value
                torch.autograd.backward(objective)
                optimizer.step()
                total += value.detach() * len(targets)
                count += len(targets)
            mean = (total / count).item()  # one synchronisation an epoch, not one a batch
            check_loss(mean, epoch=epoch, learning_rate=settings.learning_rate)
    return mean


def check_loss(value: float, *, epoch: int, learning_rate: float) -> None:
    """Raises `TrainingDiverged` unless a loss is finite."""
    if not math.isfinite(value):
        raise diverged(value, epoch=epoch, learning_rate=learning_rate)


def diverged(value: float, *, epoch: int, learning_rate: float) -> TrainingDiverged:
    """What a loss that is not finite comes to."""
    return TrainingDiverged(
        f"training: the loss was {value} in local epoch {epoch + 1} at learning_rate "
        f"{learning_rate}. No update was made; lower the learning rate, or look for inputs "
        "that are not finite."
    )


def proximal(module: nn.Module, mu: float) -> Callable[[nn.Module], Tensor]:
    """FedProx's penalty ``mu/2 * ||w - w_global||^2`` around the current weights.

    Source:
        Li et al. 2020, arXiv:1812.06127, Algorithm 2.
    """
    anchor = [p.detach().clone() for p in module.parameters()]

    def penalty(current: nn.Module) -> Tensor:
        gaps = [(p - a).square().sum() for p, a in zip(current.parameters(), anchor, strict=True)]
        return 0.5 * mu * torch.stack(gaps).sum()

    return penalty
