"""Which models can be trained for many clients at once, found from their layers and by trying."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fedcore.seeds import kept_streams
from fedcore.task.model import FullModel
from fedcore.training.dropout import WithoutDropout
from fedcore.training.function_mode import FunctionMode
from server.simulation.batched.stacked.weights import tensors_in

_MIXING = (_BatchNorm,)  # with or without running statistics
_RANDOM = (nn.RReLU, nn.FractionalMaxPool2d, nn.FractionalMaxPool3d)
_DROPPING = (nn.modules.dropout._DropoutNd,)


def unsupported_parts(model: FullModel) -> str:
    """Returns the parts of a model that prevent batched training; empty when there are none."""
    named = [
        f"{name or 'model'} ({type(module).__name__})"
        for name, module in model.model.named_modules()
        if _keeps_state(module) or isinstance(module, _RANDOM + _MIXING)
    ]
    before = [
        f"{name or 'preprocess'} ({type(module).__name__})"
        for name, module in model.preprocess.named_modules()
        if isinstance(module, _RANDOM + _MIXING + _DROPPING)
    ]
    parameters = dict(model.model.named_parameters())
    hooked = [f"{name} (with hooks)" for name, p in parameters.items() if p._backward_hooks]
    hooked += [
        f"{name or 'model'} (with hooks)"
        for name, module in model.model.named_modules()
        if module._backward_hooks or module._backward_pre_hooks
    ]
    tied = sorted(model.model.state_dict().keys() - parameters.keys()) if not named else []
    return ", ".join(named + before + hooked + [f"{name} (tied)" for name in tied])


def _keeps_state(module: nn.Module) -> bool:
    """Whether a module has buffers that travel with the model; others, such as masks, are fixed."""
    return any(name not in module._non_persistent_buffers_set for name in module._buffers)


def mixes_examples(model: nn.Module, inputs: Tensor) -> str:
    """Tests a model on examples, without dropout; returns why they affect each other, or empty.

    Also finds models that draw other random numbers.

    Args:
        model: Is run in training mode.
        inputs: A preprocessed batch.
    """
    was_training = model.training
    model.train()
    try:
        with torch.no_grad(), WithoutDropout():
            together = model(inputs)
            try:
                alone = torch.cat([model(one.unsqueeze(0)) for one in inputs])
            except Exception as error:  # the task's code may not support such a batch
                return (
                    f"the model does not accept a batch of one example ({type(error).__name__}: "
                    f"{error})"
                )
    finally:
        model.train(was_training)
    scale = float(together.abs().max()) if together.is_floating_point() else 1.0
    if not torch.allclose(together, alone, rtol=1e-3, atol=1e-4 * scale):
        return "the model mixes the examples of a batch, or draws random numbers"
    return ""


@dataclass(frozen=True)
class Sizes:
    """Sizes of what a model computes."""

    largest: int
    """Largest number of values that a function computes for one example."""
    own: frozenset[int]
    """Sizes of dimensions that are the same for batches of any number of examples."""


def sizes_of(model: nn.Module, inputs: Tensor) -> Sizes:
    """Returns the sizes of what a model computes, from batches of two and of three examples.

    Args:
        model: Is run twice, without dropout.
        inputs: A preprocessed batch.
    """
    few = [torch.arange(count, device=inputs.device) % len(inputs) for count in (2, 3)]
    seen = [_Recording() for _ in few]
    with torch.no_grad(), kept_streams(), WithoutDropout():
        for rows, one in zip(few, seen, strict=True):
            with one:
                model(inputs[rows])
    fixed = {size for one in (*model.parameters(), *model.buffers()) for size in one.shape}
    fixed |= set(inputs.shape[1:]) | (seen[0].dimensions & seen[1].dimensions)
    return Sizes(seen[1].largest // 3, frozenset(fixed))


class _Recording(FunctionMode):
    """Torch function mode that records the sizes of functions' arguments and results."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0
        self.dimensions: set[int] = set()

    def call(self, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        found = func(*args, **kwargs)
        results = list(tensors_in([found]))
        self.largest = max([self.largest, *(one.numel() for one in results)])
        with torch._C.DisableTorchFunction():
            for one in (*tensors_in((*args, *kwargs.values())), *results):
                self.dimensions.update(one.shape)
        return found
