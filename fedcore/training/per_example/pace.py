"""Times a step of private training without the data."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from fedcore.privacy.planning import PrivatePlan
from fedcore.seeds import kept_streams
from fedcore.task.definition import Task
from fedcore.task.model import FullModel
from fedcore.training.per_example.clipped_sum import Batch, clipped_sum
from fedcore.training.per_example.gradient_methods import GradientMethod
from fedcore.training.per_example.trial import synthetic_examples

_MAX_ROWS = 64
"""Maximum number of examples timed; a larger batch's time is extrapolated linearly."""


def step_seconds(
    task: Task,
    model: FullModel,
    method: GradientMethod,
    plan: PrivatePlan,
    *,
    batch_size: int,
    memory_bytes: int,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Returns the seconds that one step takes on this machine, measured on synthetic examples.

    The result depends on the task, the settings and the machine, but on nobody's data. It is 0
    where no synthetic targets fit the loss.
    """
    rows = max(1, min(batch_size, _MAX_ROWS))
    with kept_streams():
        tried = synthetic_examples(task, model, rows)
        targets = tried.targets
        if targets is None:  # no usual kind of target fits the loss, so nothing can be timed
            return 0.0
        device = tried.inputs.device
        counted = torch.ones(rows, dtype=torch.bool, device=device)
        batch = Batch(tried.inputs, targets, counted, 0)
        taken_s = []
        for _ in range(2):  # the first run includes one-time setup
            began_s = clock()
            clipped_sum(
                method,
                model.preprocess,
                model.model,
                task.loss_of,
                [batch],
                clip_norm=plan.clip_norm,
                physical=method.rows(memory_bytes),
            )
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            taken_s.append(clock() - began_s)
    return min(taken_s) * batch_size / rows
