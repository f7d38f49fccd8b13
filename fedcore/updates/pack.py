"""A model's weights as one float32 vector: one array a message instead of one a tensor."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fedcore.errors import InvalidUpdate
from fedcore.files import sha256_hex

if TYPE_CHECKING:  # a server hears devices before it has imported torch, which takes seconds
    from torch import Tensor, nn

Vector = NDArray[np.float32]


@dataclass(frozen=True)
class Layout:
    """Which tensors stand where in a vector of length ``size``.

    Parameters and floating-point buffers are packed, in the order of the state dict. Integer
    buffers (counters) stay what the model was built with.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    @cached_property
    def size(self) -> int:
        """Length of the vector."""
        return sum(prod(shape) for shape in self.shapes)

    @cached_property
    def digest(self) -> str:
        """Equal for two models exactly when their vectors can be exchanged."""
        return sha256_hex(json.dumps([self.names, self.shapes]).encode())


def layout_of(model: nn.Module) -> Layout:
    """The layout of a model's vector."""
    tensors = _packed(model)
    return Layout(tuple(tensors), tuple(tuple(t.shape) for t in tensors.values()))


def pack(model: nn.Module) -> Vector:
    """The model's weights, shape ``(D,)``, float32, a copy."""
    import torch

    flat = [tensor.detach().float().cpu().flatten() for tensor in _packed(model).values()]
    return torch.cat(flat).numpy() if flat else np.zeros(0, np.float32)


def unpack(vector: Vector, model: nn.Module) -> None:
    """Writes a vector ``(D,)`` into the model, in place.

    Raises:
        InvalidUpdate: its length is not the model's.
    """
    import torch

    tensors = _packed(model).values()
    size = sum(tensor.numel() for tensor in tensors)
    if vector.shape != (size,):
        raise InvalidUpdate(
            f"weights: got shape {vector.shape}, expected ({size},) for this model. They were not "
            "loaded; server and client must run the same task."
        )
    source, start = torch.from_numpy(np.array(vector, dtype=np.float32)), 0
    with torch.no_grad():
        for tensor in tensors:
            count = tensor.numel()
            tensor.copy_(source[start : start + count].view(tensor.shape))
            start += count


def _packed(model: nn.Module) -> dict[str, Tensor]:
    return {name: t for name, t in model.state_dict().items() if t.is_floating_point()}
