"""Checks of the numbers that a server sends, before private training reads any data."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fedcore.errors import InvalidUpdate
from fedcore.task.model import FullModel
from fedcore.updates.frozen import frozen_parameters
from fedcore.updates.local import local_tensors
from fedcore.updates.messages import Instruction
from fedcore.updates.pack import layout_of

_LARGEST_WEIGHT = 1e6
_LARGEST_STATISTIC = 1e12
"""Largest values accepted from a server under example-level privacy; training never gets there."""


def check_instruction(instruction: Instruction, model: FullModel, *, initial: bool) -> None:
    """Rejects numbers from a server that no honest training produces, whatever the examples are.

    Args:
        instruction: The server's request.
        model: The model with the numbers that came.
        initial: Whether the model's local layers are the server's initial ones.

    Raises:
        InvalidUpdate: A weight, a preprocessing statistic or FedProx's ``mu`` is not finite or too
            large, or the weights are not float32.
    """
    if instruction.weights.dtype != np.float32:  # abs() of the smallest integer is negative
        raise InvalidUpdate(
            f"round {instruction.round}: the server's weights are {instruction.weights.dtype}, "
            "expected float32. Nothing was trained or charged; server and client must run the same "
            "version."
        )
    weights = instruction.weights[: len(instruction.weights) - layout_of(model.model).whole]
    frozen = [t.detach() for t in frozen_parameters(model.model).values() if t.numel()]
    local = list(local_tensors(model.model).values()) if initial else []
    statistics = [t.detach().to("cpu") for t in model.preprocess.buffers() if t.numel()]
    found = [
        ("weight", float(np.abs(weights).max(initial=0)), _LARGEST_WEIGHT),
        ("proximal_mu", abs(instruction.proximal_mu), _LARGEST_WEIGHT),
        *(("statistic of inputs", _largest(t), _LARGEST_STATISTIC) for t in statistics),
        *(("frozen weight", _largest(t), _LARGEST_WEIGHT) for t in frozen),
        *(
            ("weight of a local layer", _largest(t.detach()), _LARGEST_WEIGHT)
            for t in local
            if t.numel()
        ),
    ]
    for what, largest, limit in found:
        if not largest <= limit:  # also true for NaN
            raise InvalidUpdate(
                f"round {instruction.round}: the server sent a {what} of {largest:g}, expected at "
                f"most {limit:g}. Nothing was trained or charged; the server's model has diverged, "
                "or the server is not honest."
            )


def _largest(values: Tensor) -> float:
    wide = torch.complex128 if values.is_complex() else torch.float64
    if values.is_floating_point():  # without a copy in another type
        return max(abs(float(one)) for one in values.aminmax())
    return float(values.to(wide).abs().max())
