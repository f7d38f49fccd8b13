"""Packs a model's state into one float32 vector, so that a message needs one array."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fedcore.errors import InvalidUpdate, TaskError
from fedcore.files import sha256_hex
from fedcore.updates.local import local_names

if TYPE_CHECKING:  # a server accepts connections before torch, which takes seconds, is imported
    from torch import Tensor, dtype, nn

Vector = NDArray[np.float32]
LARGEST_WHOLE = 2**24
"""Largest magnitude of an integer that travels: float32 has every integer up to it."""


@dataclass(frozen=True)
class Layout:
    """The positions of a model's tensors in a vector of length ``size``.

    Trained parameters and floating-point buffers come first, then integer and boolean buffers, each
    in the order of the state dict. A complex tensor is packed as pairs of numbers. A parameter that
    several layers share is packed once, under its first name. The batch counter of a normalisation
    layer of torch's that has a ``momentum`` is left out, because nothing reads it.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    integers: int = 0
    """How many of the tensors, the last ones, hold integers or booleans."""

    @cached_property
    def size(self) -> int:
        """Length of the vector."""
        return sum(prod(shape) for shape in self.shapes)

    @cached_property
    def whole(self) -> int:
        """How many elements of the vector, the last ones, stand for integers or booleans."""
        return sum(prod(shape) for shape in self.shapes[len(self.shapes) - self.integers :])

    @cached_property
    def digest(self) -> str:
        """SHA-256, in hexadecimal; equal exactly for models whose vectors are interchangeable."""
        form = [self.names, self.shapes, *([self.integers] if self.integers else [])]
        return sha256_hex(json.dumps(form).encode())


def layout_of(model: nn.Module) -> Layout:
    """Returns the layout of a model's vector.

    Raises:
        TaskError: an integer is larger than `LARGEST_WHOLE`, so float32 would change it.
    """
    floats, integers = _packed(model)
    _check_integers(integers)
    tensors = floats | integers
    return Layout(tuple(tensors), tuple(tuple(t.shape) for t in tensors.values()), len(integers))


def pack(model: nn.Module) -> Vector:
    """Returns a copy of the model's state, shape ``(D,)``, float32.

    Raises:
        TaskError: an integer is larger than `LARGEST_WHOLE`, so float32 would change it.
    """
    import torch

    floats, integers = _packed(model)
    _check_integers(integers)
    tensors = [*floats.values(), *integers.values()]
    flat = [tensor.detach().float().cpu().flatten() for tensor in tensors]
    return torch.cat(flat).numpy() if flat else np.zeros(0, np.float32)


def unpack(vector: Vector, model: nn.Module) -> None:
    """Writes a vector ``(D,)`` into the model, in place.

    An integer becomes the nearest one, a half the even one, within what its type can hold. A
    boolean is true above one half. So a mean of several models' vectors becomes a state again.

    Raises:
            InvalidUpdate: the vector's length differs from the model's.
    """
    import torch

    floats, integers = _packed(model)
    size = sum(tensor.numel() for tensor in (*floats.values(), *integers.values()))
    if vector.shape != (size,):
        raise InvalidUpdate(
            f"weights: got shape {vector.shape}, expected ({size},) for this model. They were not "
            "loaded; server and client must run the same task."
        )
    source, start = torch.from_numpy(np.array(vector, dtype=np.float32)), 0
    with torch.no_grad():
        for tensor in (*floats.values(), *integers.values()):
            part = source[start : start + tensor.numel()].view(tensor.shape)
            floating = tensor.is_floating_point()
            tensor.copy_(part if floating else _whole(part, tensor.dtype))
            start += tensor.numel()


def _check_integers(integers: Mapping[str, Tensor]) -> None:
    for name, tensor in integers.items():
        largest = int(tensor.long().abs().max()) if tensor.numel() else 0
        if largest > LARGEST_WHOLE:
            raise TaskError(
                f"model: integer buffer {name!r} holds {largest}, expected at most 2**24 = "
                f"{LARGEST_WHOLE}. It travels as float32, which would change it, so it was not "
                "sent; register a constant with persistent=False, and keep counters smaller."
            )


def _whole(values: Tensor, dtype: dtype) -> Tensor:
    """Returns float32 values as integers or booleans of a dtype."""
    import torch

    if dtype == torch.bool:
        return values > 0.5
    kind = torch.iinfo(dtype)
    low, high = max(kind.min, -LARGEST_WHOLE), min(kind.max, LARGEST_WHOLE)
    return values.nan_to_num().round().clamp(low, high).to(dtype)  # rounds halves to even


def _packed(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Returns the tensors that travel: those of floating point, then the others."""
    import torch

    left_out, local = _unread_counters(model), local_names(model)
    floats: dict[str, Tensor] = {}
    integers: dict[str, Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not isinstance(tensor, torch.Tensor) or id(tensor) in left_out or tensor.is_quantized:
            continue
        if name in local:
            continue
        if isinstance(tensor, torch.nn.Parameter):
            if not tensor.requires_grad:
                continue  # see `fedcore.updates.frozen`
            left_out.add(id(tensor))  # shared with a later layer
        if tensor.is_complex():
            floats[name] = torch.view_as_real(tensor.detach())
        else:
            (floats if tensor.is_floating_point() else integers)[name] = tensor
    return floats, integers


def _unread_counters(model: nn.Module) -> set[int]:
    """Returns the ids of counters of batches that only a layer without ``momentum`` would read."""
    from torch.nn.modules.batchnorm import _NormBase

    return {
        id(layer.num_batches_tracked)
        for layer in model.modules()
        if isinstance(layer, _NormBase)
        and type(layer).__module__.startswith("torch.nn.")  # a user's own may read it
        and layer.momentum is not None
    }
