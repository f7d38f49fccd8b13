"""Golden inputs for the self-test on devices: synthetic, so that they contain nobody's data."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedcore.artifacts.golden import Golden
from fedcore.artifacts.parity import FloatArray
from fedcore.seeds import torch_rng
from fedcore.task.definition import Examples, size_of
from fedcore.task.named import NamedInputs
from fedcore.training.batches import in_order

GOLDEN_INPUTS = 32
_MAX_INPUT_BYTES = 16 << 20
"""Most bytes of all golden inputs; of inputs that are large there are fewer."""
_MAX_RUN_BYTES = 64 << 20
"""Most bytes of outputs that a self-test computes; of outputs that are large there are fewer."""
_MAX_OUTPUT_BYTES = 16 << 20
"""Most bytes of outputs that a release carries; of larger ones some numbers are drawn."""
_MIN_EXAMPLES = 32
_BATCH_SIZE = 512
_SMALLEST_SCALE = 1e-6  # avoids a zero tolerance for outputs that are always 0


def golden_inputs(
    example_input: Tensor,
    examples: Examples | None,
    *,
    seed: int,
    count: int = GOLDEN_INPUTS,
    named: NamedInputs | None = None,
) -> NDArray[Any]:
    """Returns synthetic inputs that resemble real ones enough to exercise a model.

    Real inputs would carry somebody's data to every device. Floats are uniform between the smallest
    and largest value of each feature in the cloud's training data: sensors differ by orders of
    magnitude, and ranges alone don't reveal an example. With fewer than 32 examples a range nearly
    reveals one; then, and without data, inputs are ``example_input`` plus uniform noise in ``[-1,
    1]``. Integers (tokens) are uniform between 0 and the largest value in the data or in
    ``example_input``. Integers and bools among named inputs keep to the range of their position in
    the data, or to that between 0 and ``example_input``.

    Args:
        example_input: One input, without the batch dimension; gives shape and dtype.
        examples: The cloud's training data, if any.
        seed: The run's seed.
        count: Number of inputs.
        named: The inputs that the vector ``example_input`` holds, if they have names.

    Returns:
        Inputs ``(count, ...)`` of the dtype of ``example_input``.
    """
    rng = torch_rng(seed, "golden")
    least, largest = _range(example_input, examples, None if named is None else ~named.floats)
    unit = torch.rand((count, *example_input.shape), generator=rng, dtype=torch.float64)
    if named is not None:
        wide = least + unit * (largest - least)
        steps = (least + unit * (largest - least + 1)).floor().minimum(largest)
        mixed = torch.where(named.floats, wide, steps)
        inputs = named.pack(named.unpack(mixed))  # each in its own dtype
    elif example_input.is_floating_point():
        inputs = least + unit * (largest - least)
    else:
        inputs = (unit * (largest.max().clamp(min=0) + 1)).floor()
    return inputs.to(example_input.dtype).numpy()


def golden_count(input_bytes: int, output_bytes: int) -> int:
    """Returns how many golden inputs fit a release and a self-test, at least 1.

    Args:
        input_bytes: Size of one input.
        output_bytes: Size of its outputs.
    """
    fit = min(_MAX_INPUT_BYTES // max(input_bytes, 1), _MAX_RUN_BYTES // max(output_bytes, 1))
    return max(1, min(GOLDEN_INPUTS, fit))


def stored(inputs: NDArray[Any], outputs: FloatArray, *, seed: int) -> Golden:
    """Returns what a release stores of golden inputs and outputs ``(N, ...)``.

    All of it, unless the outputs have more than 16 MiB: then as many numbers as fit, at places
    drawn by the run's seed, the same for each input.
    """
    if outputs.nbytes <= _MAX_OUTPUT_BYTES:
        return Golden(inputs, outputs)
    flat = outputs.reshape(len(outputs), -1)
    count = max(1, _MAX_OUTPUT_BYTES // (len(flat) * flat.itemsize))
    order = torch.randperm(flat.shape[1], generator=torch_rng(seed, "golden places"))
    places = order[:count].sort().values.numpy()
    return Golden(inputs, np.ascontiguousarray(flat[:, places]), places)


def tolerance(reference: FloatArray, *, relative: float) -> float:
    """Returns an absolute tolerance for outputs, relative to the largest value in ``reference``."""
    return relative * max(float(np.abs(reference).max(initial=0.0)), _SMALLEST_SCALE)


def _range(
    example_input: Tensor, examples: Examples | None, whole: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Returns the least and the largest value of each position; ``whole`` marks integers."""
    example = example_input.double()
    if example_input.is_floating_point():
        if examples is None or size_of(examples) < _MIN_EXAMPLES:
            least, largest = example - 1, example + 1
            if whole is None:
                return least, largest
            zero = torch.zeros_like(example)
            return (
                torch.where(whole, example.minimum(zero), least),
                torch.where(whole, example.maximum(zero), largest),
            )
        least, largest = torch.full_like(example, torch.inf), torch.full_like(example, -torch.inf)
    else:
        least = largest = example
        if examples is None:
            return least, largest
    for inputs, _ in in_order(examples, _BATCH_SIZE):
        wide = inputs.double()
        gone = torch.isnan(wide)  # missing values, which a task may take
        least = torch.minimum(least, wide.masked_fill(gone, torch.inf).amin(dim=0))
        largest = torch.maximum(largest, wide.masked_fill(gone, -torch.inf).amax(dim=0))
    empty = largest < least
    return torch.where(empty, example - 1, least), torch.where(empty, example + 1, largest)
