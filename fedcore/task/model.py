"""The full model for training, export and serving: preprocessing, then the task's network.

Builds it, and converts it and its preprocessing to and from safetensors bytes.
"""

from __future__ import annotations

from typing import cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from fedcore.config.run import RunConfig
from fedcore.errors import DataError, InsufficientMemory, InvalidUpdate, TaskError
from fedcore.files import read_bytes
from fedcore.observability.foreign import foreign
from fedcore.seeds import global_streams
from fedcore.task.answers import new_model
from fedcore.task.definition import Task
from fedcore.training.memory import memory_errors
from fedcore.updates.frozen import freeze
from fedcore.updates.local import mark_local
from fedcore.updates.pack import layout_of

MAX_CHECKPOINT_BYTES = 8 << 30  # 8 GiB


class Standardise(nn.Module):
    """Subtracts a mean and divides by a deviation, per feature; both are buffers."""

    mean: Tensor
    deviation: Tensor

    def __init__(self, shape: torch.Size) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(shape))
        self.register_buffer("deviation", torch.ones(shape))

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``(B, *shape)`` to ``(B, *shape)``."""
        return (x - self.mean) / self.deviation


class FullModel(nn.Module):
    """A model with its preprocessing: ``preprocess`` (untrained) on raw inputs, then ``model``."""

    def __init__(self, preprocess: nn.Module, model: nn.Module) -> None:
        super().__init__()
        self.preprocess = preprocess
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        """Returns the network's outputs for raw inputs ``(B, ...)``."""
        return cast(Tensor, self.model(self.preprocess(x)))


def build_model(task: Task, run: RunConfig) -> FullModel:
    """Returns a new model whose initial weights the run's seed determines.

    Raises:
            TaskError: building failed, the preprocessing has parameters, no weight is trained, or
                ``client.local`` or ``client.frozen`` does not fit the model.
            InsufficientMemory: memory is too small for it.
    """
    try:
        with (
            memory_errors(f"task {task.name!r}: building the model"),
            global_streams(run.seed, "initial weights"),
        ):
            model = new_model(task)
            preprocess = task.preprocess() if task.preprocess else nn.Identity()
    except InsufficientMemory:
        raise
    except (Exception, SystemExit) as error:  # user code: any failure counts as one of the task
        raise TaskError(
            f"task {task.name!r}: building the model failed: {type(error).__name__}: {error}. "
            "Nothing was run."
        ) from error
    if any(True for _ in preprocess.parameters()):
        raise TaskError(
            f"task {task.name!r}: preprocess has parameters, which would be trained. Nothing was "
            "run; use buffers instead."
        )
    freeze(model, run.client.frozen)
    if not any(p.requires_grad for p in model.parameters()):
        raise TaskError(
            f"task {task.name!r}: the model has no trainable parameters. Nothing was run."
        )
    mark_local(model, run.client.local)
    if run.client.local and not layout_of(model).size:
        raise TaskError(
            f"task {task.name!r}: client.local matches all of the model, so nothing is left to "
            "train together. Nothing was run; match fewer layers."
        )
    if run.federation.normalisation != "task":
        shape = _standardised_shape(task, preprocess)
        preprocess = nn.Sequential(preprocess, Standardise(shape))
    return FullModel(preprocess, model)


def _standardised_shape(task: Task, preprocess: nn.Module) -> torch.Size:
    if not task.example_input.is_floating_point():
        raise TaskError(
            f"task {task.name!r}: inputs of dtype {task.example_input.dtype} cannot be normalised. "
            "Nothing was run; set federation.normalisation to 'task'."
        )
    named = task.named_inputs
    if named is not None and not all(dtype.is_floating_point for dtype in named.dtypes):
        raise TaskError(
            f"task {task.name!r}: not all of its named inputs are floats, so they cannot be "
            "normalised. Nothing was run; set federation.normalisation to 'task', and scale "
            "floats in preprocess."
        )
    with torch.inference_mode():
        return preprocess(task.example_input.unsqueeze(0)).shape[1:]  # type: ignore[no-any-return]


def standardise_of(model: FullModel) -> Standardise:
    """Returns the part of a model that contains the normalisation statistics."""
    return next(m for m in model.preprocess.modules() if isinstance(m, Standardise))


def preprocess_bytes(model: FullModel) -> bytes:
    """Returns the state of the preprocessing as safetensors; empty if there is none."""
    state = model.preprocess.state_dict()
    return save({name: tensor.contiguous() for name, tensor in state.items()}) if state else b""


def load_preprocess(raw: bytes, model: FullModel) -> None:
    """Loads a state that the server sent into the preprocessing.

    Raises:
        InvalidUpdate: the state does not fit this model.
    """
    try:
        model.preprocess.load_state_dict(load(raw) if raw else {})
    except (SafetensorError, RuntimeError) as error:
        raise InvalidUpdate(
            "preprocessing: the values that the server sent do not fit this task: "
            f"{foreign(error)}. Nothing was trained; server and client must run the same task."
        ) from None


def checkpoint_bytes(model: nn.Module) -> bytes:
    """Returns all weights and buffers as safetensors."""
    state = model.state_dict()
    return save({name: t.detach().cpu().clone().contiguous() for name, t in state.items()})


def load_checkpoint(raw: bytes, model: nn.Module, *, where: str) -> None:
    """Loads safetensors into a model of the same shape.

    Raises:
            DataError: the bytes are no safetensors, or their tensors differ from the model's.
    """
    try:
        state = load(raw)
    except SafetensorError as error:
        raise DataError(
            f"{where}: not a safetensors checkpoint ({error}). Nothing was run."
        ) from None
    mine = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    theirs = {name: tuple(t.shape) for name, t in state.items()}
    if mine != theirs:
        missing, extra = sorted(mine.keys() - theirs.keys()), sorted(theirs.keys() - mine.keys())
        changed = sorted(n for n in mine.keys() & theirs.keys() if mine[n] != theirs[n])
        raise DataError(
            f"{where}: this checkpoint belongs to another model: missing {missing}, extra "
            f"{extra}, other shapes {changed}. Nothing was run."
        )
    model.load_state_dict(state)


def warm_start(run: RunConfig, model: FullModel) -> None:
    """Loads the checkpoint ``federation.initial``, if the configuration sets one."""
    if run.federation.initial is None:
        return
    path = run.path(run.federation.initial)
    raw = read_bytes(path, max_bytes=MAX_CHECKPOINT_BYTES, what="the initial checkpoint")
    load_checkpoint(raw, model, where=str(path))
