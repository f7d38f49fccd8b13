"""What a model's outputs are, from one forward pass: their form, and whether they can learn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fedcore.task.answers import answer_of
from fedcore.task.kinds.protocol import Kind, OutputForm

_SHAPES = (
    "View",
    "Reshape",
    "UnsafeView",
    "Squeeze",
    "Unsqueeze",
    "Transpose",
    "T",
    "Permute",
    "Select",
    "Slice",
    "Clone",
    "ToCopy",
    "Alias",
)
"""Operations that leave each number unchanged, by the name of their gradient."""
_ENDINGS = {
    "Softmax": "softmax",
    "Sigmoid": "sigmoid",
    "LogSigmoid": "logsigmoid",
    "LogSoftmax": "log_softmax",
}


@dataclass(frozen=True)
class Probed:
    """A model's outputs for a task's example input."""

    form: OutputForm
    learns: bool
    """Whether the outputs depend on a trainable parameter, with a gradient."""
    ending: str
    """The operation that gives the outputs, if it turns logits into probabilities; else empty."""
    choices: bool
    """Whether outputs are choices that were made already: whole numbers, not all of them 0."""
    wrapped: bool = False
    """Whether the model gives them in an object, a dict or a tuple."""


def probe(preprocess: nn.Module, model: nn.Module, inputs: Tensor) -> Probed | None:
    """Runs a fresh model in evaluation mode; None if its outputs are not one row per input.

    Args:
        preprocess: Runs before the model.
        model: The model; its buffers may change.
        inputs: Shape ``(B, ...)``.

    Raises:
        Exception: the task's code raised it.
    """
    with torch.no_grad():
        inputs = preprocess.eval()(inputs)
    with torch.enable_grad():
        given = model.eval()(inputs)
    found = answer_of(given)
    if not isinstance(found, Tensor) or found.shape[:1] != inputs.shape[:1]:
        return None
    values = found.detach()
    choices = not values.is_floating_point() or _are_whole(values)
    return Probed(
        OutputForm(values.shape[1:], values.dtype),
        found.requires_grad,
        _ending(found),
        choices,
        wrapped=found is not given,
    )


def cannot_learn(probed: Probed) -> str:
    """Returns why training cannot move a model, as a sentence with the remedy; empty if it can."""
    if probed.learns:
        return ""
    if probed.choices:
        why = "they are choices already, as argmax or one_hot give them, which have no gradient"
    else:
        why = "they come from detach(), .data or no_grad(), or from parameters that are not trained"
    return (
        f"outputs carry no gradient, so training cannot change the model: {why}. Return the scores "
        "of all classes, or the values themselves, as the last layer gives them"
    )


def learns_badly(kind: Kind, probed: Probed, *, own_loss: bool) -> str:
    """Returns why a model learns worse than it could, as a sentence; empty if it does not.

    An own loss may take probabilities, so nothing is said of it.
    """
    ending = probed.ending
    if not ending or not kind.logits or own_loss:
        return ""
    if ending == "log_softmax" and kind.presentation in ("label", "tokens", "dense"):
        return ""  # the loss leaves log-probabilities as they are
    return (
        f"The model ends in {ending}, and the usual loss of kind {kind.name!r} takes logits and "
        "applies its own: gradients are small, and training is slow or stops early. Leave "
        f"{ending} out of `forward`; decisions stay the same, and devices give probabilities from "
        "logits."
    )


def _ending(outputs: Tensor) -> str:
    node: Any = outputs.grad_fn
    while node is not None:
        name = type(node).__name__.partition("Backward")[0].lstrip("_")
        if name in _ENDINGS:
            return _ENDINGS[name]
        if name not in _SHAPES or not node.next_functions:
            return ""
        node = node.next_functions[0][0]
    return ""


def _are_whole(values: Tensor) -> bool:
    return bool((values == values.floor()).all()) and bool(values.any())
