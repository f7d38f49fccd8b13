"""Training without example-level privacy: the loop that clients, pruning and the cloud share."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.utils.data import Subset

from fedcore.errors import TrainingDiverged
from fedcore.task.definition import Examples, Loss, size_of
from fedcore.training.batches import batches_of, gather, passes
from fedcore.training.lone_rows import least_rows, use_running_statistics
from fedcore.training.order import ViewsOfAnyMemory, for_images

_LOOKED_AT = 1024  # rows at once


class OptimizerSettings(Protocol):
    """Optimiser settings that ``[client]`` and ``[finetune]`` share."""

    @property
    def optimizer(self) -> str: ...
    @property
    def learning_rate(self) -> float: ...
    @property
    def momentum(self) -> float: ...
    @property
    def nesterov(self) -> bool: ...
    @property
    def weight_decay(self) -> float: ...
    @property
    def max_grad_norm(self) -> float | None: ...


def make_optimizer(
    module: nn.Module, settings: OptimizerSettings, *, fused: bool = False
) -> torch.optim.Optimizer:
    """Returns the configured optimiser for a module's trainable parameters.

    Args:
        module: The module.
        settings: The optimiser's settings.
        fused: Whether one kernel updates all parameters, which rounds otherwise.
    """
    return optimizer_of(_trained(module), settings, fused=fused)


def _trained(module: nn.Module) -> list[Tensor]:
    return [p for p in module.parameters() if p.requires_grad]


def optimizer_of(
    parameters: Sequence[Tensor], settings: OptimizerSettings, *, fused: bool = False
) -> torch.optim.Optimizer:
    """Returns the configured optimiser for the given parameters."""
    kernel = True if fused else None  # None: torch's own choice
    if settings.optimizer != "sgd":
        cls = torch.optim.AdamW if settings.optimizer == "adamw" else torch.optim.Adam
        return cls(
            parameters,
            lr=settings.learning_rate,
            weight_decay=settings.weight_decay,
            fused=kernel,
        )
    return torch.optim.SGD(
        parameters,
        lr=settings.learning_rate,
        momentum=settings.momentum,
        nesterov=settings.nesterov,
        weight_decay=settings.weight_decay,
        fused=kernel,
    )


def clip_gradients(module: nn.Module, settings: OptimizerSettings) -> None:
    """Scales the gradients of all parameters to ``max_grad_norm`` where they are longer."""
    if settings.max_grad_norm is not None:
        nn.utils.clip_grad_norm_(module.parameters(), settings.max_grad_norm)


def train(
    module: nn.Module,
    examples: Examples,
    loss: Loss,
    settings: OptimizerSettings,
    *,
    epochs: int,
    batch_size: int,
    rng: torch.Generator,
    steps: int | None = None,
    physical_batch_size: int | None = None,
    penalty: Callable[[nn.Module], Tensor] | None = None,
    between: Callable[[], None] | None = None,
) -> float:
    """Trains ``module`` in place and returns the mean loss over the last pass over the data.

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
        steps: Steps to take, in place of ``epochs``: as many passes as they need, the last one
            perhaps in part.
        physical_batch_size: Most examples in memory at once; a larger batch is computed in parts,
            whose gradients add up to that of the whole for a loss that is a mean over examples.
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
    least = least_rows(
        module,
        loss,
        examples,
        count=count,
        batch_size=batch_size,
        physical_batch_size=physical_batch_size,
    )
    module.train()
    if count < least:
        use_running_statistics(module)
    mean = 0.0
    with for_images(module) as images:
        views = ViewsOfAnyMemory() if images else nullcontext()
        order = passes(count, batch_size, rng, epochs=epochs, steps=steps, least=least)
        for epoch, batches in enumerate(order):
            total, seen = torch.zeros((), device=device), 0
            for rows in batches:
                if between is not None:
                    between()
                optimizer.zero_grad(set_to_none=True)
                for part in batches_of(rows, physical_batch_size or len(rows), least=least):
                    inputs, targets = gather(examples, part)
                    inputs = inputs.to(device)
                    if images and inputs.dim() == 4:
                        inputs = inputs.contiguous(memory_format=torch.channels_last)
                    with views:
                        value = loss(module(inputs), targets.to(device))
                    objective = value
                    if len(part) < len(rows):
                        objective = value * (len(part) / len(rows))
                    if penalty and part[0] == rows[0]:  # once a step, with the first part
                        objective = objective + penalty(module)
                    torch.autograd.backward(objective)
                    total += value.detach() * len(targets)
                    seen += len(targets)
                clip_gradients(module, settings)
                optimizer.step()
            mean = (total / seen).item()  # one device synchronisation per epoch, not per batch
            if not math.isfinite(mean):
                raise diverged(
                    mean, epoch=epoch, learning_rate=settings.learning_rate, examples=examples
                )
    return mean


def check_loss(value: float, *, epoch: int, learning_rate: float) -> None:
    """Raises `TrainingDiverged` unless a loss is finite."""
    if not math.isfinite(value):
        raise diverged(value, epoch=epoch, learning_rate=learning_rate)


def diverged(
    value: float, *, epoch: int | None, learning_rate: float, examples: Examples | None = None
) -> TrainingDiverged:
    """Returns the error for a loss that is not finite.

    Args:
        value: The loss.
        epoch: The local epoch, from 0; None where it is unknown.
        learning_rate: The step size.
        examples: The data; an input in them that is not finite is named first, as the likely cause.
    """
    when = "" if epoch is None else f" in local epoch {epoch + 1}"
    found = None if examples is None else first_not_finite(examples)
    remedy = "lower the learning rate, or look for inputs that are not finite"
    if found is not None:
        remedy = (
            f"row {found[0]} of the data has an input of {found[1]}: fill or leave out such rows, "
            "or lower the learning rate if the task takes them"
        )
    return TrainingDiverged(
        f"training: the loss was {value}{when} at learning_rate {learning_rate}. No update was "
        f"produced; {remedy}."
    )


def first_not_finite(examples: Examples) -> tuple[int, float] | None:
    """Returns the first row with an input that is not finite, and that value; None if all are.

    Of a part of a data set, the row is that of the whole.
    """
    for rows in torch.split(torch.arange(size_of(examples)), _LOOKED_AT):
        inputs, _ = gather(examples, rows)
        odd = ~torch.isfinite(inputs)
        if bool(odd.any()):
            place = torch.nonzero(odd)[0]
            row = int(rows[place[0]])
            whole: Examples = examples
            while isinstance(whole, Subset):
                row, whole = int(whole.indices[row]), whole.dataset
            return row, float(inputs[tuple(place)])
    return None


def proximal(module: nn.Module, mu: float) -> Callable[[nn.Module], Tensor]:
    """Returns FedProx's penalty ``mu/2 * ||w - w_global||^2`` around the module's current weights.

    Source:
        Li et al. 2020, arXiv:1812.06127, Algorithm 2.
    """
    anchor = [p.detach().clone() for p in _trained(module)]

    def penalty(current: nn.Module) -> Tensor:
        gaps = [(p - a).square().sum() for p, a in zip(_trained(current), anchor, strict=True)]
        return 0.5 * mu * torch.stack(gaps).sum()

    return penalty
