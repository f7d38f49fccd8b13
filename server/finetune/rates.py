"""The learning rate of each step: warm-up, then constant or along half a cosine."""

from __future__ import annotations

import math

from fedcore.config.finetune import Finetune
from server.finetune.order import Position


def rate_of(settings: Finetune, position: Position, steps_per_epoch: int) -> float:
    """Returns the learning rate of the next step.

    Args:
        settings: ``learning_rate``, ``schedule``, ``warmup_steps`` and ``epochs`` are used.
        position: The steps taken so far, and the factor of rollbacks.
        steps_per_epoch: Steps of one pass over the data.
    """
    rate = settings.learning_rate * position.rate_scale
    if position.step < settings.warmup_steps:
        return rate * (position.step + 1) / (settings.warmup_steps + 1)
    if settings.schedule == "cosine":
        steps = max(1, settings.epochs * steps_per_epoch - settings.warmup_steps)
        passed = min(1.0, (position.step - settings.warmup_steps) / steps)
        return rate * (1 + math.cos(math.pi * passed)) / 2
    return rate
