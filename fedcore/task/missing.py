"""Missing values in inputs: where a model takes NaN, as a trial shows.

One rule holds everywhere: NaN is allowed at those positions of an input where the full model, with
its preprocessing, gives finite outputs for it; infinity is allowed nowhere.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fedcore.task.named import NamedInputs

_TRIED_ALONE = 1024
"""Inputs with at most this many numbers are tried with NaN at one position at a time."""


def missing_allowed(
    model: nn.Module, example_input: Tensor, named: NamedInputs | None = None
) -> Tensor:
    """Returns where an input may be NaN: a bool tensor in the shape of ``example_input``.

    Each position is tried alone, and then all that passed together. Of inputs with more than 1024
    numbers, either all positions may be NaN or none. Of named inputs only floats may be missing:
    integers and bools have no NaN, and converting one gives an ordinary number.

    Args:
        model: The full model, whose weights are finite.
        example_input: One input, without the batch dimension.
        named: The inputs that the vector ``example_input`` holds, if they have names.
    """
    nowhere = torch.zeros(example_input.shape, dtype=torch.bool)
    if not example_input.is_floating_point() or not example_input.numel():
        return nowhere
    was_training = model.training
    model.eval()
    try:
        possible = torch.ones_like(nowhere) if named is None else named.floats
        tried = possible
        if example_input.numel() <= _TRIED_ALONE:
            each = torch.eye(example_input.numel(), dtype=torch.bool) & possible.flatten()
            passed = _finite_for(model, example_input, each).reshape(example_input.shape)
            tried = passed & possible
        together = _finite_for(model, example_input, tried.reshape(1, -1))
        return tried if bool(together.all()) and bool(tried.any()) else nowhere
    except (Exception, SystemExit):  # the task's code; what it cannot do, it does not allow
        return nowhere
    finally:
        model.train(was_training)


def _finite_for(model: nn.Module, example_input: Tensor, missing: Tensor) -> Tensor:
    """Returns for each row of ``missing`` whether the outputs with NaN there are finite."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    flat = example_input.detach().cpu().reshape(1, -1)
    inputs = torch.where(missing, torch.nan, flat).to(example_input.dtype)
    with torch.inference_mode():
        outputs = model(inputs.reshape(-1, *example_input.shape).to(device))
    return torch.isfinite(outputs).reshape(len(missing), -1).all(dim=1).cpu()
