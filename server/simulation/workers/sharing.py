"""Frozen parameters that all workers of a machine share, so that memory holds them once."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from fedcore.config.run import RunConfig
from fedcore.task.definition import Task
from fedcore.task.model import build_model
from fedcore.updates.frozen import frozen_parameters


def with_shared_frozen(task: Task, run: RunConfig) -> Task:
    """Returns the task, whose models all use the same memory for their frozen parameters.

    Forked processes share it, too. Training does not write to it; what does is refused by
    `fedcore.updates.frozen.check_unchanged`.
    """
    shared = {
        name: one.detach() for name, one in frozen_parameters(build_model(task, run).model).items()
    }
    if not shared:
        return task

    def model() -> nn.Module:
        made = task.model()
        for name, parameter in made.named_parameters():
            if name in shared:  # frozen by the task, or by the run once it is built
                parameter.data = shared[name]
        return made

    return replace(task, model=model)
