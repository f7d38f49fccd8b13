"""A model as a chain of products, which many clients can run through at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedcore.kernels.window import ConvolutionWindow
from fedcore.training.per_example.images import back_to_image, convolved, largest, patches

Elementwise = Callable[..., Tensor]
Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Dense:
    """One dense layer: names of its weight ``(out, in)`` and bias ``(out,)`` in the model."""

    weight: str
    bias: str | None


@dataclass(frozen=True)
class Conv(Dense):
    """One convolution, its weight ``(out, C, kh, kw)``, with the pooling behind it."""

    window: ConvolutionWindow
    channels: int
    """Of images that it takes: C."""
    outs: int


@dataclass(frozen=True)
class Step:
    """Applies ``apply`` to results of earlier steps (a `Place` among the arguments)."""

    apply: Dense | Elementwise
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True)
class Place:
    """Stands for the result of a step among a step's arguments."""

    index: int


@dataclass(frozen=True)
class Chain:
    """A model as steps; the input is place 0, step ``i`` gives place ``i + 1``."""

    steps: tuple[Step, ...]
    output: int
    numbers: int = 0
    """The most that a layer is given or makes of one example."""

    @property
    def layers(self) -> tuple[Dense, ...]:
        """The layers with weights, in the order in which they run."""
        return tuple(step.apply for step in self.steps if isinstance(step.apply, Dense))


@dataclass(frozen=True)
class Pass:
    """What a run through the chain leaves for the way back.

    A dense layer has one row an example, a convolution several.
    """

    output: Tensor
    """``(K, B, ...)``."""
    inputs: Sequence[Tensor]
    """What each layer's weights were multiplied with, ``(K, B, in)`` or ``(K, B, R, in)``."""
    products: Sequence[Tensor]
    """What that gave, ``(K, B, out)`` or ``(K, B, R, out)``."""
    results: Sequence[Tensor]
    """With the bias, and pooled: ``(K, B, out)`` or ``(K, B, P, out)``."""


Share = tuple[Tensor, Tensor, Tensor]
"""Of one layer: what its weights were multiplied with, the slopes of what that gave, and those of
its results, with the bias, summed up over some of their rows or not; shapes as in a `Pass`."""


@dataclass(frozen=True)
class Made:
    """A layer's gradient over each client's whole batch."""

    weight: Tensor
    """``(K, out, in)``, see `matrix`."""
    bias: Tensor
    """``(K, out)``; of no use to a layer without one."""


@dataclass(frozen=True)
class Each:
    """A layer's gradient of each example."""

    weight: Tensor
    """``(K, B, out, in)``, see `matrix`; the last two may lie in memory the other way round."""
    bias: Tensor
    """``(K, B, out)``; of no use to a layer without one."""


Back = Callable[[Tensor], Iterable[Share | Made | Each]]
"""From the slopes of a chain's output to each layer's part, in their order; to be called once.
Where examples are left apart no part is `Made`."""


def left_apart(part: Share | Made | Each) -> Share | Each:
    """A layer's part of a run that leaves examples apart."""
    assert not isinstance(part, Made)
    return part


Run = Callable[[Weights, Tensor], tuple[Tensor, Back]]
"""Runs ``K`` clients' batches ``(K, B, ...)`` through ``K`` copies of the weights."""


def flattened(x: Tensor) -> Tensor:
    """``(K, B, ...)`` with a row an example."""
    return x.flatten(2)


def by_torch(chain: Chain) -> Run:
    """Runs any chain anywhere."""

    def run(weights: Weights, x: Tensor) -> tuple[Tensor, Back]:
        passed = run_chain(chain, weights, x)
        return passed.output, lambda slopes: _back(passed, slopes)

    return run


def _back(passed: Pass, slopes: Tensor) -> Iterable[Share]:
    if not passed.output.requires_grad:
        return zip(passed.inputs, [slopes], [slopes], strict=True)
    anchors = [*passed.products, *passed.results]
    found = torch.autograd.grad([passed.output], anchors, [slopes])
    return zip(passed.inputs, found[: len(found) // 2], found[len(found) // 2 :], strict=True)


def stacked(chain: Chain, weights: Weights, clients: int) -> Weights:
    """A copy of the weights for each of ``clients``, in the memory that `matrix` needs."""
    copies = {}
    convolutions = {one.weight for one in chain.layers if isinstance(one, Conv)}
    for name, tensor in weights.items():
        if name in convolutions:
            rows = tensor.permute(0, 2, 3, 1)
            copies[name] = _repeated(rows, clients).permute(0, 1, 4, 2, 3)
        else:
            copies[name] = _repeated(tensor, clients)
    return copies


def _repeated(tensor: Tensor, clients: int) -> Tensor:
    """Copies, never the tensor itself: one client's would be, if it were only stretched."""
    return tensor.new_empty((clients, *tensor.shape)).copy_(tensor)


def matrix(layer: Dense, weight: Tensor) -> Tensor:
    """A layer's stacked weights ``(K, ...)`` as the matrices of its products, ``(K, out, in)``."""
    if isinstance(layer, Conv):
        return weight.permute(0, 1, 3, 4, 2).view(*weight.shape[:2], -1)
    return weight


def like_weight(layer: Dense, products: Tensor, weight: Tensor) -> Tensor:
    """Matrices ``(K, out, in)`` in the shape of a layer's stacked weights; undoes `matrix`."""
    if isinstance(layer, Conv):
        clients, out, channels, high, wide = weight.shape
        return products.view(clients, out, high, wide, channels).permute(0, 1, 4, 2, 3)
    return products.view(weight.shape)


def run_chain(chain: Chain, weights: Weights, x: Tensor) -> Pass:
    """Runs ``K`` clients' batches through ``K`` copies of the weights.

    Args:
        chain: From `fedcore.training.per_example.graph.find_chain`.
        weights: From `stacked`, by their names in the model; no gradient reaches them.
        x: ``(K, B, ...)``.
    """
    places: list[Tensor] = [x]
    inputs: list[Tensor] = []
    products: list[Tensor] = []
    results: list[Tensor] = []
    for step in chain.steps:
        layer = step.apply
        if not isinstance(layer, Dense):
            args = [places[a.index] if isinstance(a, Place) else a for a in step.args]
            places.append(layer(*args, **step.kwargs))
            continue
        a = places[step.args[0].index]
        if isinstance(layer, Conv):
            rows, z, result = _convolved(layer, weights, a)
            cells = layer.window.cells(*a.shape[3:])
            places.append(result.view(*a.shape[:2], *cells, -1).permute(_IMAGE))
        else:
            rows, z = a.detach(), _dense(layer, weights, a)
            result = z
            places.append(result)
        inputs.append(rows)
        products.append(z)
        results.append(result)
    return Pass(places[chain.output], inputs, products, results)


_IMAGE = (0, 1, 4, 2, 3)  # of results (K, B, H, W, C)


def _dense(layer: Dense, weights: Weights, a: Tensor) -> Tensor:
    """``(K, B, in)`` through a dense layer: ``(K, B, out)``, from which slopes flow."""
    weight = weights[layer.weight].transpose(1, 2)
    if layer.bias is None:
        return _anchored(torch.bmm(a, weight))
    return _anchored(torch.baddbmm(weights[layer.bias].unsqueeze(1), a, weight))


def _convolved(layer: Conv, weights: Weights, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``(K, B, C, H, W)`` through a convolution: what was looked at, products, results.

    The bias comes behind the pooling, where fewer numbers are left for it: rounding keeps order, so
    the largest sum is that of the largest.
    """
    window, weight = layer.window, matrix(layer, weights[layer.weight])
    window.check(*image.shape[3:])
    rows = patches(image.detach(), window)
    z = convolved(image.detach(), weight, window)
    if z is None:
        z = products(rows, weight)
    if image.requires_grad:
        z = back_to_image(image, z, weight, window)
    z = result = _anchored(z)
    if window.pool != (1, 1):
        result = largest(z.view(*z.shape[:2], math.prod(window.pool), -1, z.shape[3]), 2)
    if layer.bias is not None:
        result = result + weights[layer.bias][:, None, None]
    return rows, z, result


def products(rows: Tensor, weight: Tensor) -> Tensor:
    """Rows ``(K, B, R, F)`` times weights ``(K, out, F)``: ``(K, B, R, out)``.

    One client's examples are taken one by one on a CPU: each then stays in a core's cache.
    """
    if len(rows) == 1 and not rows.is_cuda:
        each = weight.transpose(1, 2).expand(rows.shape[1], -1, -1)
        return torch.bmm(rows[0], each).unsqueeze(0)
    return torch.bmm(rows.flatten(1, 2), weight.transpose(1, 2)).view(*rows.shape[:3], -1)


def _anchored(z: Tensor) -> Tensor:
    """``z`` as something that slopes flow back to."""
    if not z.requires_grad and torch.is_grad_enabled():
        z.requires_grad_()
    return z
