"""Local layers: the part of a model that stays on each client, see ``client.local``.

`mark_local` says which state of a model is local; packing then leaves it out. A client keeps what
`local_state` returns between its rounds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from flwr.app import ConfigRecord, Context, RecordDict

from fedcore.errors import DataError, TaskError, TrainingDiverged
from fedcore.updates.named_tensors import load_into

if TYPE_CHECKING:  # see `fedcore.updates.pack`
    from torch import Tensor, nn

_MARK = "_fedcore_local"
_RECORD, _STATE = "fedcore.local", "state"


def mark_local(model: nn.Module, patterns: Sequence[str]) -> None:
    """Marks the state that stays on clients: what a pattern matches by name or class of its layer.

    Frozen parameters are left out: they are the same on all clients.

    Args:
        model: The network.
        patterns: Such as ``head.*`` for names, or ``BatchNorm*`` for classes of layers.

    Raises:
        TaskError: A pattern matches nothing, or a shared parameter under one of its names alone.
    """
    if not patterns:
        return
    state = model.state_dict(keep_vars=True)
    kinds = {name: type(layer).__name__ for name, layer in model.named_modules()}
    found = set[str]()
    for pattern in patterns:
        hits = {
            name
            for name in state
            if fnmatchcase(name, pattern) or fnmatchcase(_kind_of(name, kinds), pattern)
        }
        if not hits:
            raise TaskError(
                f"client.local: {pattern!r} matches no state of the model, neither by name nor by "
                f"class of its layer; its names are {', '.join(list(state)[:20])}. Nothing was "
                "run; correct the pattern."
            )
        found |= hits
    shared = {id(state[name]) for name in found}
    split = [name for name in state if id(state[name]) in shared and name not in found]
    if split:
        raise TaskError(
            f"client.local: {', '.join(split)} shares its values with a layer that is to stay on "
            "clients, and is not to stay itself. Nothing was run; match both names, or none."
        )
    trained = {name for name in found if not _is_frozen(state[name])}
    setattr(model, _MARK, frozenset(trained))


def _kind_of(name: str, kinds: Mapping[str, str]) -> str:
    return kinds.get(name.rpartition(".")[0], "")


def _is_frozen(tensor: Tensor) -> bool:
    import torch

    return isinstance(tensor, torch.nn.Parameter) and not tensor.requires_grad


def local_names(model: nn.Module) -> frozenset[str]:
    """Returns the names of the state that stays on clients; empty without local layers."""
    found: frozenset[str] = getattr(model, _MARK, frozenset())
    return found


def local_tensors(model: nn.Module) -> Mapping[str, Tensor]:
    """Returns the state that stays on clients, each tensor once."""
    names = local_names(model)
    if not names:
        return {}
    found: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name in names:
            found.setdefault(id(tensor), (name, tensor))
    return dict(found.values())


def local_state(model: nn.Module) -> bytes:
    """Returns a copy of the state that stays on clients, as safetensors; empty if there is none.

    Raises:
        TrainingDiverged: A value is not finite.
    """
    from safetensors.torch import save

    found = local_tensors(model)
    if not found:
        return b""
    for name, tensor in found.items():
        if not bool(tensor.detach().isfinite().all()):
            raise TrainingDiverged(
                f"training: local layer {name} holds values that are not finite. It was not kept, "
                "and no update was sent; lower client.learning_rate."
            )
    return save({name: tensor.detach().cpu().contiguous() for name, tensor in found.items()})


def load_local(raw: bytes, model: nn.Module) -> None:
    """Writes what `local_state` returned into a model.

    Raises:
        DataError: It belongs to another model.
    """
    problem = load_into(raw, local_tensors(model))
    if problem:
        raise _misfit(problem)


def _misfit(what: str) -> DataError:
    return DataError(
        f"local layers: what this client kept of them does not fit the task's model ({what}). "
        "Nothing was trained; start a run of another name, or restore the task that began this one."
    )


def read_local(context: Context) -> bytes:
    """Returns the local layers in a node's state; empty before its first round."""
    record = context.state.get(_RECORD)
    value = record.get(_STATE, b"") if isinstance(record, ConfigRecord) else b""
    return value if isinstance(value, bytes) else b""


def write_local(context: Context, raw: bytes) -> None:
    """Replaces the local layers in a node's state."""
    if raw:
        context.state[_RECORD] = ConfigRecord({_STATE: raw})


def drop_local(state: RecordDict) -> bool:
    """Removes the local layers from a node's state; returns whether there were any."""
    return state.pop(_RECORD, None) is not None
