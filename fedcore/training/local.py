"""Training without example-level privacy: the loop that clients, pruning and the cloud share."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Protocol

import torch
from torch import Tensor, nn

from fedcore.errors import TrainingDiverged
from fedcore.task.definition import Examples, Loss, size_of
from fedcore.training.batches import shuffled
from fedcore.training.lone_rows import least_rows, use_running_statistics
from fedcore.training.order import ViewsOfAnyMemory, for_images


class OptimizerSettings(Protocol):
    """Optimiser settings that ``[client]`` and ``[finetune]`` share."""

    @property
    def optimizer(self) -> str: ...
    @property
    def learning_rate(self) -> float: ...
    @property
    def momentum(self) -> float: ...
    @property
    def weight_decay(self) -> float: ...


def make_optimizer(module: nn.Module, settings: OptimizerSettings) -> torch.optim.Optimizer:
    """Returns the configured optimiser for a module's trainable parameters."""
    return optimizer_of([p for p in module.parameters() if p.requires_grad], settings)


def optimizer_of(
    parameters: Sequence[Tensor], settings: OptimizerSettings
) -> torch.optim.Optimizer:
    """Returns the configured optimiser for the given parameters."""
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

    Where the model cannot train on a batch of one, as with batch normalisation, a last batch of one
    joins the batch before, and a single example is trained on with running statistics.

    Args:
        module: The model, on the device to train on.
        examples: Local data.
        loss: Mean loss over a batch.
        settings: Optimiser settings.
        epochs: Passes over the data.
        batch_size: Examples per step.
        rng: Generator for the order of examples.
        penalty: Term added to each batch's loss, such as FedProx's proximal term.
        between: Callback before each step; an exception from it ends the work.

    Raises:
        TrainingDiverged: The mean loss of an epoch is not finite; ``module`` must then be
            discarded.
        DataError: There is one example, and a layer needs two.
    """
    device = next(module.parameters()).device
    optimizer = make_optimizer(module, settings)
    count = size_of(examples)
    least = least_rows(module, loss, examples, count=count, batch_size=batch_size)
    module.train()
    if count < least:
        use_running_statistics(module)
    mean = 0.0
    with for_images(module) as images:
        views = ViewsOfAnyMemory() if images else nullcontext()
        for epoch in range(epochs):
            total = torch.zeros((), device=device)
            for inputs, targets in shuffled(examples, batch_size, rng, least=least):
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
            mean = (total / count).item()  # one device synchronisation per epoch, not per batch
            check_loss(mean, epoch=epoch, learning_rate=settings.learning_rate)
    return mean


def check_loss(value: float, *, epoch: int, learning_rate: float) -> None:
    """Raises `TrainingDiverged` unless a loss is finite."""
    if not math.isfinite(value):
        raise diverged(value, epoch=epoch, learning_rate=learning_rate)


def diverged(value: float, *, epoch: int, learning_rate: float) -> TrainingDiverged:
    """Returns the error for a loss that is not finite."""
    return TrainingDiverged(
        f"training: the loss was {value} in local epoch {epoch + 1} at learning_rate "
        f"{learning_rate}. No update was produced; lower the learning rate, or look for inputs "
        "that are not finite."
    )


def proximal(module: nn.Module, mu: float) -> Callable[[nn.Module], Tensor]:
    """Returns FedProx's penalty ``mu/2 * ||w - w_global||^2`` around the module's current weights.

    Source:
        Li et al. 2020, arXiv:1812.06127, Algorithm 2.
    """
    anchor = [p.detach().clone() for p in module.parameters()]

    def penalty(current: nn.Module) -> Tensor:
        gaps = [(p - a).square().sum() for p, a in zip(current.parameters(), anchor, strict=True)]
        return 0.5 * mu * torch.stack(gaps).sum()

    return penalty
