"""Golden inputs, which travel to devices with a model: made up, so that they are nobody's data."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedcore.artifacts.parity import FloatArray
from fedcore.seeds import torch_rng
from fedcore.task.definition import Examples, size_of
from fedcore.training.batches import in_order

GOLDEN_INPUTS = 32
_MIN_EXAMPLES = 32
_BATCH_SIZE = 512
_SMALLEST_SCALE = 1e-6  # an output that is always 0 still has a scale to be relative to


def golden_inputs(
    example_input: Tensor, examples: Examples | None, *, seed: int, count: int = GOLDEN_INPUTS
) -> NDArray[Any]:
    """Synthetic inputs that look enough like real ones to exercise a model.

    Real inputs would carry somebody's data to every device, so none is used. Floats are uniform,
    feature by feature, between the least and the largest value in the cloud's training data: a
    range for each feature, as sensors differ by orders of magnitude, and from ranges alone no
    example can be told. With fewer than 32 examples a range comes close to an example; then, and
    without data, they are ``example_input`` plus uniform noise in ``[-1, 1]``. Integers (tokens)
    are uniform between 0 and the largest that occurs in the data or in ``example_input``.

    Args:
        example_input: One input, without the batch dimension; gives shape and dtype.
        examples: The cloud's training data, if there is any.
        seed: Of the run.
        count: How many to make.

    Returns:
        Inputs ``(count, ...)`` of the dtype of ``example_input``.
    """
    rng = torch_rng(seed, "golden")
    least, largest = _range(example_input, examples)
    unit = torch.rand((count, *example_input.shape), generator=rng, dtype=torch.float64)
    if example_input.is_floating_point():
        inputs = least + unit * (largest - least)
    else:
        inputs = (unit * (largest.max().clamp(min=0) + 1)).floor()
    return inputs.to(example_input.dtype).numpy()


def tolerance(reference: FloatArray, *, relative: float) -> float:
    """An absolute tolerance for outputs like ``reference``, relative to the largest of them."""
    return relative * max(float(np.abs(reference).max(initial=0.0)), _SMALLEST_SCALE)


def _range(example_input: Tensor, examples: Examples | None) -> tuple[Tensor, Tensor]:
    example = example_input.double()
    if example_input.is_floating_point():
        if examples is None or size_of(examples) < _MIN_EXAMPLES:
            return example - 1, example + 1
        least, largest = torch.full_like(example, torch.inf), torch.full_like(example, -torch.inf)
    else:
        least = largest = example
        if examples is None:
            return least, largest
    for inputs, _ in in_order(examples, _BATCH_SIZE):
        least = torch.minimum(least, inputs.double().amin(dim=0))
        largest = torch.maximum(largest, inputs.double().amax(dim=0))
    return least, largest
