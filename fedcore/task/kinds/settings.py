"""Checks of a task's settings for its targets: class weights, ignored value, label smoothing."""

from __future__ import annotations

import math
from dataclasses import fields

from fedcore.errors import TaskError
from fedcore.observability.words import counted
from fedcore.task.kinds.protocol import Kind, OutputForm, TargetOptions

_OF_USUAL_LOSS = ("class_weights", "label_smoothing")


def check_options(kind: Kind, options: TargetOptions, *, task: str, own_loss: bool) -> None:
    """Checks settings that a task file states, before any model or data exists.

    Raises:
        TaskError: a setting is out of range, or nothing would use it.
    """
    usual = TargetOptions()
    given = [one.name for one in fields(options)]
    given = [name for name in given if getattr(options, name) != getattr(usual, name)]
    for name in given:
        if name not in kind.options:
            raise TaskError(
                f"task {task!r}: {name} has no meaning for kind {kind.name!r}. Nothing was run; "
                "leave it out, or choose a kind with classes."
            )
        if own_loss and name in _OF_USUAL_LOSS:
            raise TaskError(
                f"task {task!r}: {name} changes the kind's usual loss, and the task states its "
                f"own. Nothing was run; leave `loss` out, or apply {name} in it."
            )
    weights, smoothing, ignored = (
        options.class_weights,
        options.label_smoothing,
        options.ignore_index,
    )
    if any(not (math.isfinite(one) and one >= 0) for one in weights) or (
        weights and not any(weights)
    ):
        raise TaskError(
            f"task {task!r}: class_weights are {list(weights)}, expected finite numbers of at "
            "least 0, not all 0. Nothing was run; correct the task file."
        )
    if not 0 <= smoothing < 1:
        raise TaskError(
            f"task {task!r}: label_smoothing is {smoothing}, expected from 0 to below 1. Nothing "
            "was run; correct the task file."
        )
    if ignored is not None and (isinstance(ignored, bool) or not isinstance(ignored, int)):
        raise TaskError(
            f"task {task!r}: ignore_index is {ignored!r}, expected a whole number. Nothing was "
            "run; correct the task file."
        )


def check_outputs(
    kind: Kind,
    options: TargetOptions,
    outputs: OutputForm,
    *,
    task: str,
    labels: tuple[str, ...],
) -> None:
    """Checks that a model's outputs are of a kind, with as many classes as labels and weights.

    Raises:
        TaskError: they are not.
    """
    wrong = kind.wrong_outputs(outputs)
    if wrong:
        raise TaskError(f"task {task!r}: its model's {wrong}. Nothing was trained.")
    classes = kind.labels(outputs)
    if labels and classes is not None and len(labels) != classes:
        raise TaskError(
            f"task {task!r}: {counted(len(labels), 'label')} for {counted(classes, 'output')}. "
            "Nothing was trained; name each class once, in the order of the outputs."
        )
    if options.class_weights and len(options.class_weights) != classes:
        raise TaskError(
            f"task {task!r}: {counted(len(options.class_weights), 'class weight')} for "
            f"{counted(classes or 0, 'output')}. Nothing was trained; give each class "
            "one weight, in the order of the outputs."
        )
