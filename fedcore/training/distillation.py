"""A guard against forgetting: training stays close to what a frozen teacher answers.

In: a model, its teacher and a task's loss. Out: a module that answers for both, and a loss that
adds the distance between the answers. Start with `beside_teacher`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from fedcore.task.kinds.protocol import Kind, Loss

Both = tuple[Tensor, Tensor]
"""Outputs of a model and of its teacher, each ``(B, ...)``."""
BothLoss = Callable[[Both, Tensor], Tensor]


class BesideTeacher(nn.Module):
    """A model and its frozen teacher; the forward pass returns the outputs of both."""

    def __init__(self, student: nn.Module, teacher: nn.Module) -> None:
        super().__init__()
        self.student = student
        self.teacher = teacher.requires_grad_(False)

    def train(self, mode: bool = True) -> BesideTeacher:
        """Switches the model's mode; the teacher stays in evaluation mode."""
        super().train(mode)
        self.teacher.eval()
        return self

    def forward(self, x: Tensor) -> Both:
        """Returns both outputs for inputs ``(B, ...)``."""
        with torch.no_grad():
            told = self.teacher(x)
        return self.student(x), told


def beside_teacher(
    student: nn.Module, teacher: nn.Module, loss: Loss, kind: Kind, *, weight: float
) -> tuple[nn.Module, BothLoss]:
    """Returns a module and a loss that train ``student`` in place, close to ``teacher``.

    The loss is ``(1 - weight) * loss + weight * distance``. The kind decides the distance: the
    cross-entropy of the teacher's distribution for classes and tokens, for a regression the task's
    own loss with the teacher's outputs as targets. Both have the scale of the task's loss.

    Args:
        student: The model to train.
        teacher: The model that must not be forgotten. Copied, not changed.
        loss: Mean loss over a batch.
        kind: The task's kind, which decides the distance.
        weight: Share of the distance, from 0 to below 1; 0 trains on the labels alone.

    Source:
        Li and Hoiem 2016, arXiv:1606.09282 (learning without forgetting), with the new data in
        place of the old task's.
    """
    frozen = copy.deepcopy(teacher).eval()
    device = next((each.device for each in student.parameters()), torch.device("cpu"))

    def combined(outputs: Both, targets: Tensor) -> Tensor:
        own, told = outputs
        distance = kind.distance(own, told, targets, loss)
        return (1 - weight) * loss(own, targets) + weight * distance

    return BesideTeacher(student, frozen.to(device)), combined
