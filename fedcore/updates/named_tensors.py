"""Reads tensors by name, from safetensors, into those of a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from fedcore.observability.foreign import foreign

if TYPE_CHECKING:  # a server accepts connections before torch, which takes seconds, is imported
    from torch import Tensor


def load_into(raw: bytes, tensors: Mapping[str, Tensor]) -> str:
    """Writes values into tensors in place, all of them or none.

    Args:
        raw: Safetensors; empty for no tensors.
        tensors: What to write into, by name.

    Returns:
        Why the values do not fit, as printable text; empty if they were written.
    """
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        values = load(raw) if raw else {}
    except SafetensorError as error:
        return f"not readable: {foreign(error, 200)}"
    forms = [
        {name: (tuple(one.shape), one.dtype) for name, one in part.items()}
        for part in (tensors, values)
    ]
    if forms[0] != forms[1]:
        return f"{len(values)} tensors, expected {len(tensors)} of other names or shapes"
    with torch.no_grad():
        for name, tensor in tensors.items():
            tensor.copy_(values[name])
    return ""
