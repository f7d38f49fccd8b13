"""Training that brings a compressed model close to the model that it stands for.

In: a student, its teacher and the cloud's data. The student changes in place. Start with
`train_close`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from fedcore.config.finetune import Finetune
from fedcore.errors import CompressionError, TrainingDiverged
from fedcore.seeds import global_streams, torch_rng
from fedcore.task.definition import Examples, Loss
from fedcore.task.kinds.protocol import Kind
from fedcore.training.distillation import beside_teacher
from fedcore.training.local import train

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d)
"""Layers that are pruned, and whose rounding is trained for."""


@dataclass(frozen=True)
class Teacher:
    """A model that answers beside the student in training."""

    model: nn.Module
    weight: float
    """Share of the distance to its answers in the loss, from 0 to below 1."""


def train_close(
    student: nn.Module,
    teacher: Teacher,
    examples: Examples,
    loss: Loss,
    kind: Kind,
    settings: Finetune,
    *,
    epochs: int,
    seed: int,
    purpose: str,
) -> None:
    """Trains a student in place on the cloud's data, close to its teacher's answers.

    Args:
        student: The model to train, on the CPU.
        teacher: The model before compression. Not changed.
        examples: The cloud's training data.
        loss: Mean loss over a batch.
        kind: The task's kind.
        settings: Optimiser settings and batch size.
        epochs: Passes over ``examples``; 0 for no training.
        seed: The run's seed; with ``purpose`` it determines the order of examples and dropout.
        purpose: What the training is for, a name of its random streams.

    Raises:
        CompressionError: training fails, or its loss is not finite.
    """
    trained, loss_of = student, cast(Callable[[Any, Tensor], Tensor], loss)
    if teacher.weight:
        trained, loss_of = beside_teacher(student, teacher.model, loss, kind, weight=teacher.weight)
    try:
        with global_streams(seed, purpose):
            train(
                trained,
                examples,
                loss_of,
                settings,
                epochs=epochs,
                batch_size=settings.batch_size,
                rng=torch_rng(seed, purpose, "order"),
            )
    except (TrainingDiverged, RuntimeError, ValueError) as error:
        raise CompressionError(f"training it on the cloud's data failed: {short(error)}") from error


def layers_run(module: nn.Module, example_batch: Tensor) -> list[nn.Module]:
    """Returns the linear and convolutional layers, in the order in which they run."""
    ran: list[nn.Module] = []
    hooks = [
        layer.register_forward_hook(lambda layer, *_: ran.append(layer))
        for layer in module.modules()
        if isinstance(layer, LAYERS)
    ]
    with torch.no_grad():
        module(example_batch)
    for hook in hooks:
        hook.remove()
    return ran


def short(error: BaseException) -> str:
    """Returns the first line of an error, at most 200 characters."""
    return str(error).strip().partition("\n")[0][:200] or "no reason given"
