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


@dataclass(frozen=True)
class CloudTraining:
    """What every candidate that is trained trains with."""

    examples: Examples
    """The cloud's training data."""
    loss: Loss
    """Mean loss over a batch."""
    kind: Kind
    """The task's kind, which decides the distance between answers."""
    settings: Finetune
    """Optimiser settings, batch size, and ``remember``."""
    seed: int
    """The run's seed; determines the order of examples and dropout."""


def train_close(
    student: nn.Module, teacher: Teacher, training: CloudTraining, *, epochs: int, purpose: str
) -> None:
    """Trains a student in place on the cloud's data, close to its teacher's answers.

    Args:
        student: The model to train, on the CPU.
        teacher: The model before compression. Not changed.
        training: Data, loss and settings.
        epochs: Passes over the data; 0 for no training.
        purpose: What the training is for, a name of its random streams.

    Raises:
        CompressionError: training fails, or its loss is not finite.
    """
    trained, loss_of = student, cast(Callable[[Any, Tensor], Tensor], training.loss)
    if teacher.weight:
        trained, loss_of = beside_teacher(
            student, teacher.model, training.loss, training.kind, weight=teacher.weight
        )
    try:
        with global_streams(training.seed, purpose):
            train(
                trained,
                training.examples,
                loss_of,
                training.settings,
                epochs=epochs,
                batch_size=training.settings.batch_size,
                rng=torch_rng(training.seed, purpose, "order"),
            )
    except (TrainingDiverged, RuntimeError, ValueError) as error:
        raise CompressionError(f"training it on the cloud's data failed: {short(error)}") from error


def layers_of(module: nn.Module, example_batch: Tensor) -> tuple[list[nn.Module], set[nn.Module]]:
    """Returns the linear and convolutional layers that run, in order, and the last ones.

    The last ones are those whose outputs reach the model's through no other such layer: one, or
    several, as where a model has several outputs.
    """
    ran: list[tuple[Any, nn.Module]] = []
    hooks = [
        layer.register_forward_hook(lambda layer, _, found: ran.append((found.grad_fn, layer)))
        for layer in module.modules()
        if isinstance(layer, LAYERS)
    ]
    frozen = [each for each in module.parameters() if not each.requires_grad]
    try:
        for each in frozen:
            each.requires_grad_(each.is_floating_point())
        with torch.enable_grad():
            output = module(example_batch)
    finally:
        for each in frozen:
            each.requires_grad_(False)
        for hook in hooks:
            hook.remove()
    of = {id(node): layer for node, layer in ran}
    last, waiting, seen = set(), [output.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is None or id(node) in seen:
            continue
        seen.add(id(node))
        if id(node) in of:
            last.add(of[id(node)])
        else:
            waiting += [before for before, _ in node.next_functions]
    return list(dict.fromkeys(layer for _, layer in ran)), last


def short(error: BaseException) -> str:
    """Returns the first line of an error, at most 200 characters."""
    return str(error).strip().partition("\n")[0][:200] or "no reason given"
