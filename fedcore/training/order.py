"""Has a model run in the order and memory in which it is fastest; what it computes stays."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode


@contextmanager
def for_images(module: nn.Module) -> Iterator[bool]:
    """Makes a model with convolutions faster while it is used; says whether it has any.

    Weights lie in channels-last memory, in which convolutions and pooling run two to three times as
    fast on a CPU. An `nn.Sequential` that is called as a whole runs a ReLU before a max-pooling
    behind it, where it has a quarter of the numbers to look at: the largest of the positive parts
    is the positive part of the largest. Layers stay where they are, for whoever names, indexes or
    iterates over them; those with hooks run where they are. Both end with the context.

    Guarantee:
        Outputs and gradients are the same bits as in the other order of ReLU and pooling: where the
        largest is positive both choose the same element, and elsewhere both gradients are zero.
        Under `ViewsOfAnyMemory`, ``Tensor.view`` works where it would on memory in usual order.
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
        # With weights in channels-last memory, what is evaluated later would have views fail.
        module.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]


class _PoolingFirst(nn.Sequential):
    """An `nn.Sequential` whose call runs a max-pooling ahead of the ReLU that stands before it.

    A class rather than a ``forward`` of one instance: a copy of it runs its own layers.
    """

    def forward(self, input: Tensor) -> Tensor:
        x = input
        for layer in _order(self):
            x = layer(x)
        return x


_Layer = Callable[[Tensor], Tensor]


def _order(layers: nn.Sequential) -> list[_Layer]:
    """The layers in the order in which they run fastest."""
    order: list[_Layer] = list(layers)
    for place in range(len(order) - 1):
        first, second = order[place], order[place + 1]
        before = order[place - 1] if place else None
        if _is_movable_relu(first, before) and _is_plain_pooling(second):
            order[place], order[place + 1] = second, _relu
    return order


def _relu(x: Tensor) -> Tensor:
    """ReLU whose way back looks at what it was given, and not at its result.

    A layer behind the pooling may overwrite that, as nothing in the usual order needs it.
    """
    return functional.threshold(x, 0.0, 0.0)


def _is_movable_relu(layer: _Layer, before: _Layer | None) -> bool:
    if layer is _relu:
        return True
    if type(layer) is not nn.ReLU or not _is_plain(layer):
        return False
    # In place it changes what it is given, which nobody must see: a layer makes that again, and
    # hands it to nobody else.
    return not layer.inplace or _makes_new(before)


def _makes_new(layer: _Layer | None) -> bool:
    return layer is not None and type(layer) in (nn.Conv2d, nn.BatchNorm2d) and _is_plain(layer)


def _is_plain_pooling(layer: _Layer) -> bool:
    return type(layer) is nn.MaxPool2d and not layer.return_indices and _is_plain(layer)


def _is_plain(layer: _Layer) -> bool:
    """Whether a layer does what its class does, and no hook looks at what goes in and out."""
    own = vars(layer)
    return "forward" not in own and not any(own.get(hooks) for hooks in _HOOKS)


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class ViewsOfAnyMemory(TorchFunctionMode):
    """Copies what ``Tensor.view`` cannot take only for the memory that it lies in.

    A model that flattens by ``x.view(x.size(0), -1)`` is right, and would fail behind a
    convolution with channels-last weights.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        try:
            return func(*args, **kwargs)
        except RuntimeError:
            if func not in (Tensor.view, Tensor.view_as) or args[0].is_contiguous():
                raise
        return func(args[0].contiguous(), *args[1:], **kwargs)
