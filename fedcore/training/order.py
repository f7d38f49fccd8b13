"""Speeds up convolutional models by layer order and memory layout, with unchanged outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedcore.training.function_mode import FunctionMode


@contextmanager
def for_images(module: nn.Module) -> Iterator[bool]:
    """Speeds up a convolutional model within the context; yields whether it has convolutions.

    Weights are in channels-last memory, in which convolutions and pooling run two to three times as
    fast on a CPU. An `nn.Sequential` that is called as a whole runs a ReLU after the max-pooling
    that follows it: the two commute, and pooling leaves fewer values. The layers keep their
    positions for naming, indexing and iteration; layers with hooks are not moved. Both changes end
    with the context.

    Guarantee:
        Outputs and gradients are bit-identical to those of the original order: where the largest
        value is positive both orders choose the same element, elsewhere both gradients are zero.
        Under `ViewsOfAnyMemory`, ``Tensor.view`` works wherever it would on contiguous memory.
    """
    if not any(isinstance(layer, nn.Conv2d) for layer in module.modules()):
        yield False
        return
    reordered = [
        layers
        for layers in module.modules()
        if type(layers) is nn.Sequential and _is_plain(layers) and _order(layers) != list(layers)
    ]
    module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    for layers in reordered:
        layers.__class__ = _PoolingFirst
    try:
        yield True
    finally:
        for layers in reordered:
            layers.__class__ = nn.Sequential
        # With channels-last weights, views would fail in later evaluation.
        module.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]


class _PoolingFirst(nn.Sequential):
    """An `nn.Sequential` that runs each max-pooling before the ReLU that precedes it.

    It is a class, not a ``forward`` on one instance, so that a copy runs its own layers.
    """

    def forward(self, input: Tensor) -> Tensor:
        x = input
        for layer in _order(self):
            x = layer(x)
        return x


_Layer = Callable[[Tensor], Tensor]


def _order(layers: nn.Sequential) -> list[_Layer]:
    """Returns the layers in the order in which they run fastest."""
    order: list[_Layer] = list(layers)
    for place in range(len(order) - 1):
        first, second = order[place], order[place + 1]
        before = order[place - 1] if place else None
        if _is_movable_relu(first, before) and _is_plain_pooling(second):
            order[place], order[place + 1] = second, _relu
    return order


def _relu(x: Tensor) -> Tensor:
    """ReLU whose backward pass needs its input, not its output.

    A layer after the pooling may overwrite that output, which nothing needs in the original order.
    """
    return functional.threshold(x, 0.0, 0.0)


def _is_movable_relu(layer: _Layer, before: _Layer | None) -> bool:
    if layer is _relu:
        return True
    if type(layer) is not nn.ReLU or not _is_plain(layer):
        return False
    # An in-place ReLU overwrites its input. That must be a fresh tensor that nothing else reads.
    return not layer.inplace or _makes_new(before)


def _makes_new(layer: _Layer | None) -> bool:
    return layer is not None and type(layer) in (nn.Conv2d, nn.BatchNorm2d) and _is_plain(layer)


def _is_plain_pooling(layer: _Layer) -> bool:
    return type(layer) is nn.MaxPool2d and not layer.return_indices and _is_plain(layer)


def _is_plain(layer: _Layer) -> bool:
    """Returns whether a layer runs its class's ``forward`` and has no hooks."""
    own = vars(layer)
    return "forward" not in own and not any(own.get(hooks) for hooks in _HOOKS)


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class ViewsOfAnyMemory(FunctionMode):
    """Torch function mode in which ``Tensor.view`` works on any memory layout, by a copy if needed.

    A model that flattens with ``x.view(x.size(0), -1)`` is valid, but would fail after a
    convolution with channels-last weights.
    """

    def call(self, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        try:
            return func(*args, **kwargs)
        except RuntimeError:
            if func not in (Tensor.view, Tensor.view_as) or args[0].is_contiguous():
                raise
        return func(args[0].contiguous(), *args[1:], **kwargs)
