"""Which numbers of an input may be missing in a released file, as the model and the file show."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from fedcore.artifacts.manifest import MOST_MISSING, MissingAllowed
from fedcore.task.missing import missing_allowed
from fedcore.task.named import NamedInputs
from server.compression.runtime import answer, open_session

_TRIED = 64


def missing_in_file(
    reference: nn.Module,
    example_input: Tensor,
    onnx: bytes,
    *,
    tolerance: float,
    named: NamedInputs | None = None,
) -> MissingAllowed | None:
    """Returns the positions of an input that may be NaN; None if no number may be missing.

    The model decides (`fedcore.task.missing`), and the file must answer such inputs alike: an
    operation of onnxruntime may turn NaN into a number where torch's does not.

    Args:
        reference: The torch model that the file was made from, on the CPU.
        example_input: One input, without the batch dimension.
        onnx: The file.
        tolerance: Largest absolute difference of an output.
        named: The inputs that the vector ``example_input`` holds, if they have names.
    """
    allowed = missing_allowed(reference, example_input, named)
    places = torch.nonzero(allowed.flatten()).flatten()
    if not len(places) or (not allowed.all() and len(places) > MOST_MISSING):
        return None
    some = places[torch.linspace(0, len(places) - 1, min(_TRIED, len(places))).long()]
    masks = torch.zeros((len(some) + 1, allowed.numel()), dtype=torch.bool)
    masks[0] = allowed.flatten()
    masks[torch.arange(1, len(some) + 1), some] = True
    inputs = torch.where(masks, torch.nan, example_input.flatten()).to(example_input.dtype)
    inputs = inputs.reshape(-1, *example_input.shape)
    with torch.inference_mode():
        expected = reference(inputs).float().numpy()
    found = answer(open_session(onnx, threads=1), inputs.numpy())
    if not bool((np.abs(found - expected) <= tolerance).all()):  # also false for NaN
        return None
    return "all" if allowed.all() else tuple(places.tolist())
