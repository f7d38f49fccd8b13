"""Torch's modules as steps of a chain."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from fedcore.kernels.window import ConvolutionWindow, Pair
from fedcore.training.per_example.chain import (
    Conv,
    Dense,
    Elementwise,
    Recurrent,
    Scale,
    flattened,
)
from fedcore.training.per_example.sequences import is_supported

_MODULES = (
    *(nn.Identity, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU),
    *(nn.Mish, nn.Tanh, nn.Sigmoid, nn.Softplus, nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid),
)
"""Elementwise layers, which work unchanged on tensors with an additional dimension."""
_POOLING = (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)
"""Layers that process each image separately."""
_INSTANCES = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)

Apply = Dense | Recurrent | Elementwise


@dataclass(frozen=True)
class EachImage:
    """Applies a layer for ``(N, C, H, W)`` to ``(K, B, C, H, W)``."""

    layer: nn.Module

    def __call__(self, x: Tensor) -> Tensor:
        """Returns the layer's results, ``(K, B, ...)``."""
        found: Tensor = self.layer(x.flatten(0, 1))
        return found.view(*x.shape[:2], *found.shape[1:])


@dataclass(frozen=True)
class Dropped:
    """Drops values of ``(K, B, ...)``."""

    p: float

    def __call__(self, x: Tensor) -> Tensor:
        """Returns the values, some of them 0 and the others larger by ``1 / (1 - p)``."""
        return functional.dropout(x, self.p, training=True)


@dataclass(frozen=True)
class GroupNormalised:
    """Normalises groups of channels of each example, ``(K, B, C, ...)``."""

    groups: int
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        """Returns the normalised values."""
        found = functional.group_norm(x.flatten(0, 1), self.groups, eps=self.eps)
        return found.view(x.shape)


@dataclass(frozen=True)
class LayerNormalised:
    """Normalises the last dimension."""

    size: int
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        """Returns the normalised values."""
        return functional.layer_norm(x, (self.size,), eps=self.eps)


def of_module(layer: nn.Module, name: str) -> tuple[Apply, ...]:
    """Returns a module as steps, each on the result of the one before; none if unsupported.

    Args:
        layer: The module, in the mode in which the model trains: a model may keep a dropout off.
        name: Its name in the model; empty for the model itself.
    """
    dot = f"{name}." if name else ""
    weight = f"{dot}weight"
    bias = f"{dot}bias" if getattr(layer, "bias", None) is not None else None
    if type(layer) is nn.Linear:
        return (Dense(weight, bias),)
    if type(layer) is nn.Conv2d:
        window = _window(layer)
        if window is None:
            return ()
        return (Conv(weight, bias, window, layer.in_channels, layer.out_channels),)
    if type(layer) is nn.Flatten and (layer.start_dim, layer.end_dim) == (1, -1):
        return (flattened,)
    if type(layer) in _MODULES:
        return (_pure(layer),)
    if type(layer) in _POOLING and not getattr(layer, "return_indices", False):
        return (EachImage(layer),)
    if type(layer) is nn.Dropout:
        return (Dropped(layer.p) if layer.training else nn.Identity(),)
    if isinstance(layer, nn.RNNBase):
        return _recurrent(layer, dot)
    return _normalised(layer, weight, bias)


def _normalised(layer: nn.Module, weight: str, bias: str | None) -> tuple[Apply, ...]:
    apply: GroupNormalised | LayerNormalised
    if type(layer) is nn.GroupNorm:
        apply = GroupNormalised(layer.num_groups, layer.eps)
    elif isinstance(layer, _INSTANCES) and not layer.track_running_stats:
        apply = GroupNormalised(layer.num_features, layer.eps)
    elif type(layer) is nn.LayerNorm and len(layer.normalized_shape) == 1:
        apply = LayerNormalised(layer.normalized_shape[0], layer.eps)
    else:
        return ()
    if getattr(layer, "weight", None) is None:
        return (apply,)
    return apply, Scale(weight, bias, channels=isinstance(apply, GroupNormalised))


def _recurrent(layer: nn.RNNBase, dot: str) -> tuple[Recurrent, ...]:
    if not is_supported(layer):
        return ()
    kind = "lstm" if type(layer) is nn.LSTM else "gru"
    names = [
        [
            Dense(
                f"{dot}weight_{of}_l{number}", f"{dot}bias_{of}_l{number}" if layer.bias else None
            )
            for of in ("ih", "hh")
        ]
        for number in range(layer.num_layers)
    ]
    return tuple(Recurrent(kind, *both) for both in names)  # type: ignore[arg-type]


def _window(layer: nn.Conv2d) -> ConvolutionWindow | None:
    """Returns a convolution's window; None for groups, dilation or other than zero padding."""
    plain = layer.groups == 1 and layer.dilation == (1, 1) and layer.padding_mode == "zeros"
    if not plain or isinstance(layer.padding, str):
        return None
    return ConvolutionWindow(pair(layer.kernel_size), pair(layer.stride), pair(layer.padding))


def pair(value: Any) -> Pair:
    """Returns a size for both dimensions of an image as two numbers."""
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[1]))


def _pure(layer: nn.Module) -> Elementwise:
    """Returns the layer in its out-of-place form, as the backward pass needs its input."""
    layer = copy.copy(layer)
    if getattr(layer, "inplace", False):
        layer.__dict__["inplace"] = False
    return layer
