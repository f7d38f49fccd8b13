"""Frozen parameters: the part of a model that no round changes, and that travels once.

The initial values of local layers, which clients keep to themselves, travel beside them.

A message names the state by its digest. A client that built other values takes them from the
message; a device then keeps them on disk.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from flwr.app import Array, ArrayRecord

from fedcore.errors import InvalidUpdate, TaskError
from fedcore.files import sha256_hex
from fedcore.updates.local import local_tensors
from fedcore.updates.messages import FROZEN, Instruction, array_of
from fedcore.updates.named_tensors import load_into

if TYPE_CHECKING:  # see `fedcore.updates.pack`
    from torch import Tensor, nn


@dataclass(frozen=True)
class FrozenState:
    """The values of a model's frozen parameters, and of its local layers before any training."""

    raw: bytes
    """Safetensors; empty where there are none."""

    @cached_property
    def sha256(self) -> str:
        """Digest by which messages name the state; empty where there is none."""
        return sha256_hex(self.raw) if self.raw else ""

    @cached_property
    def record(self) -> ArrayRecord:
        """The record that messages carry."""
        stream = io.BytesIO()
        np.lib.format.write_array(stream, np.frombuffer(self.raw, np.uint8), version=(1, 0))
        array = Array("uint8", (len(self.raw),), "numpy.ndarray", stream.getvalue())
        return ArrayRecord({FROZEN: array})


NO_FROZEN = FrozenState(b"")


def freeze(model: nn.Module, patterns: Sequence[str]) -> None:
    """Freezes the parameters that a pattern matches by name.

    Raises:
        TaskError: A pattern matches none, or one that shares its values with one that is trained.
    """
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    found = set[str]()
    for pattern in patterns:
        hits = {name for name in names if fnmatchcase(name, pattern)}
        if not hits:
            raise TaskError(
                f"client.frozen: {pattern!r} matches no parameter of the model; its names are "
                f"{', '.join(names[:20])}. Nothing was run; correct the pattern."
            )
        found |= hits
    parameters = dict(model.named_parameters(remove_duplicate=False))
    shared = {id(parameters[name]) for name in found}
    split = [name for name in names if id(parameters[name]) in shared and name not in found]
    if split:
        raise TaskError(
            f"client.frozen: {', '.join(split)} shares its values with a parameter that is to be "
            "frozen, and is not to be frozen itself. Nothing was run; match both names, or none."
        )
    for name in found:
        parameters[name].requires_grad_(False)


def frozen_parameters(model: nn.Module) -> Mapping[str, nn.Parameter]:
    """Returns the parameters that are not trained, each once, under its first name."""
    return {name: p for name, p in model.named_parameters() if not p.requires_grad}


def frozen_state(model: nn.Module) -> FrozenState:
    """Returns a copy of the model's frozen parameters, and of the initial local layers."""
    from safetensors.torch import save

    found = {**frozen_parameters(model), **local_tensors(model)}
    values = {name: one.detach().cpu().contiguous() for name, one in found.items()}
    return FrozenState(save(values)) if values else NO_FROZEN


def received(instruction: Instruction) -> FrozenState:
    """Returns the frozen parameters that came with an instruction.

    Raises:
        InvalidUpdate: There are none, or they are not those that it names.
    """
    if not instruction.frozen_sha256:
        return NO_FROZEN
    if instruction.frozen is None:
        raise InvalidUpdate(
            f"round {instruction.round}: this client's frozen parameters are not those of the "
            "server, which has sent none. Nothing was trained; build the model with the same "
            "values on both sides, such as those of federation.initial."
        )
    values = array_of(instruction.frozen, where="frozen parameters")
    found = FrozenState(values.tobytes())
    if values.dtype != np.uint8 or found.sha256 != instruction.frozen_sha256:
        raise InvalidUpdate(
            f"round {instruction.round}: the frozen parameters that came do not have the digest "
            "that the server named. Nothing was trained; they are asked for again."
        )
    return found


def load_frozen(state: FrozenState, model: nn.Module) -> None:
    """Writes frozen parameters and initial local layers into the model, in place.

    Raises:
        InvalidUpdate: They do not fit this model.
    """
    problem = load_into(state.raw, {**frozen_parameters(model), **local_tensors(model)})
    if problem:
        raise _misfit(problem)


def _misfit(what: str) -> InvalidUpdate:
    return InvalidUpdate(
        f"frozen parameters: those that the server sent do not fit this task: {what}. Nothing was "
        "trained; server and client must run the same task."
    )


def checksums(model: nn.Module) -> Mapping[str, int]:
    """Returns a number for each frozen parameter, which changes when its values do."""
    return {name: _checksum(one.detach()) for name, one in frozen_parameters(model).items()}


def _checksum(values: Tensor) -> int:
    import torch

    flat = values.contiguous().flatten().view(torch.uint8)
    whole = len(flat) - len(flat) % 4
    words = flat[:whole].view(torch.int32)
    return hash((int(words.sum(dtype=torch.int64)), *flat[whole:].tolist()))


def check_unchanged(before: Mapping[str, int], model: nn.Module) -> None:
    """Rejects a model whose training has changed frozen parameters, which would not travel.

    Raises:
        TaskError: Names them.
    """
    now = checksums(model)
    moved = [name for name in before if before[name] != now.get(name)]
    if moved:
        raise TaskError(
            f"model: training has changed {', '.join(moved)}, although requires_grad is False. "
            "Such parameters travel once, at the start, so the change would be lost. No update was "
            "sent; train them, or register them as buffers, which take part in every round."
        )
