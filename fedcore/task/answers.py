"""The tensor among a model's outputs: models of other libraries give objects, dicts or tuples."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:
    from fedcore.task.definition import Task

_NAMES = ("logits", "out")
"""How Hugging Face's and torchvision's models name what the loss takes."""


def answer_of(outputs: Any) -> Any:
    """Returns the tensor that loss and metrics take; ``outputs`` itself if there is no such tensor.

    That is an attribute or entry ``logits`` or ``out``, the only entry, or the first of a tuple.
    """
    if isinstance(outputs, Tensor):
        return outputs
    for name in _NAMES:
        found = outputs.get(name) if isinstance(outputs, Mapping) else getattr(outputs, name, None)
        if isinstance(found, Tensor):
            return found
    if isinstance(outputs, Mapping):
        found = next(iter(outputs.values())) if len(outputs) == 1 else None
    else:
        found = outputs[0] if isinstance(outputs, tuple | list) and outputs else None
    return found if isinstance(found, Tensor) else outputs


def new_model(task: Task) -> nn.Module:
    """Builds a task's model; its outputs are a tensor, also where the task's own are an object.

    Raises:
        Exception: the task's code raised it.
    """
    wrapped = task.probed is not None and task.probed.wrapped
    model = task.model()
    if wrapped:  # names stay the same, and a model of plain tensors stays free of hooks
        model.register_forward_hook(_answered)
    return model


def tensor_model(build: Callable[[], nn.Module]) -> nn.Module:
    """Builds a network whose outputs are a tensor, also where its own are an object.

    Raises:
        Exception: the function raised it.
    """
    model = build()
    model.register_forward_hook(_answered)
    return model


def _answered(model: nn.Module, arguments: tuple[Any, ...], outputs: Any) -> Any:
    return answer_of(outputs)
