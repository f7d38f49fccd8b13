"""Packs a model's weights into one float32 vector, so that a message needs one array."""

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

if TYPE_CHECKING:  # a server accepts connections before torch, which takes seconds, is imported
    from torch import Tensor, nn

Vector = NDArray[np.float32]


@dataclass(frozen=True)
class Layout:
    """The positions of a model's tensors in a vector of length ``size``.

    Parameters and floating-point buffers are packed, in the order of the state dict. Integer
    buffers (counters) keep the values that the model was built with.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    @cached_property
    def size(self) -> int:
        """Length of the vector."""
        return sum(prod(shape) for shape in self.shapes)

    @cached_property
    def digest(self) -> str:
        """SHA-256, in hexadecimal; equal exactly for models whose vectors are interchangeable."""
        return sha256_hex(json.dumps([self.names, self.shapes]).encode())


def layout_of(model: nn.Module) -> Layout:
    """Returns the layout of a model's vector."""
    tensors = _packed(model)
    return Layout(tuple(tensors), tuple(tuple(t.shape) for t in tensors.values()))


def pack(model: nn.Module) -> Vector:
    """Returns a copy of the model's weights, shape ``(D,)``, float32."""
    import torch

    flat = [tensor.detach().float().cpu().flatten() for tensor in _packed(model).values()]
    return torch.cat(flat).numpy() if flat else np.zeros(0, np.float32)


def unpack(vector: Vector, model: nn.Module) -> None:
    """Writes a vector ``(D,)`` into the model, in place.

    Raises:
            InvalidUpdate: the vector's length differs from the model's.
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
