"""What a training step changes in a model besides its trained weights."""

from __future__ import annotations

import copy

import torch

from fedcore.errors import UnsupportedLayer
from fedcore.seeds import global_streams
from fedcore.task.definition import Task
from fedcore.task.model import FullModel
from fedcore.training.per_example.trial import synthetic_examples
from fedcore.updates.pack import layout_of


def moving_integers(task: Task, model: FullModel) -> tuple[str, ...]:
    """Returns the integer and boolean buffers that a training pass changes, of those that travel.

    All of them where the pass fails.

    Args:
        task: Provides the form of the inputs; its data are not read.
        model: A fresh model; only a copy of it runs.
    """
    layout = layout_of(model.model)
    names = layout.names[len(layout.names) - layout.integers :]
    if not names:
        return ()
    try:
        with torch.no_grad(), global_streams(1):
            copied = copy.deepcopy(model).train()
            copied(synthetic_examples(task, copied, 2).inputs)
    except Exception:  # the task's code, on random inputs
        return names
    before, after = model.model.state_dict(), copied.model.state_dict()
    return tuple(name for name in names if not torch.equal(before[name], after[name]))


def check_integers(task: Task, model: FullModel) -> None:
    """Rejects integer state that training changes, for client-level privacy.

    It is part of what a client sends. One step of a counter would fill the bound on an update, and
    noise would make flags and counters random.

    Raises:
        UnsupportedLayer: Lists each such buffer.
    """
    moved = moving_integers(task, model)
    if moved:
        raise UnsupportedLayer(
            f"model: client-level privacy does not support {', '.join(moved)}: training changes "
            "these integer or boolean buffers, one step of a counter would fill "
            "privacy.client.clip_norm, and noise would make them random. Nothing was trained; use "
            "layers without such state (BatchNorm with a momentum in place of momentum=None), or "
            "set privacy.unit to 'none'."
        )
