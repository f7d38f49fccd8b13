"""A model as a chain of matrix products that many clients' batches run through at once.

`fedcore.training.per_example.graph.find_chain` builds a `Chain` from a model. A `Run` computes its
output and each layer's part of the backward pass. Shapes start with ``K`` clients and ``B``
examples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from fedcore.kernels.window import ConvolutionWindow
from fedcore.training.per_example.images import convolved, largest, patches, with_input_gradient
from fedcore.training.per_example.scales import scale_gradients, scaled
from fedcore.training.per_example.sequences import unrolled

Elementwise = Callable[..., Tensor]
Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Dense:
    """A dense layer: the names in the model of its weight ``(out, in)`` and bias ``(out,)``."""

    weight: str
    bias: str | None


@dataclass(frozen=True)
class Conv(Dense):
    """A convolution with weight ``(out, C, kh, kw)``, and the pooling that follows it."""

    window: ConvolutionWindow
    channels: int
    """Channels of the input images: C."""
    outs: int


@dataclass(frozen=True)
class Scale(Dense):
    """The weight and bias that follow a normalisation: one of each per channel or value."""

    channels: bool
    """Whether they are for the channels of ``(K, B, C, ...)``, or for the last dimension."""


@dataclass(frozen=True)
class Recurrent:
    """A GRU or LSTM layer, forwards over sequences ``(K, B, T, in)`` from a state of zeros."""

    kind: Literal["gru", "lstm"]
    of_inputs: Dense
    """Weight ``(G * H, in)`` for ``G`` gates, and bias."""
    of_states: Dense
    """Weight ``(G * H, H)``, and bias."""


@dataclass(frozen=True)
class Step:
    """Applies ``apply`` to results of earlier steps, which each `StepResult` argument names."""

    apply: Dense | Recurrent | Elementwise
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True)
class StepResult:
    """A reference, among a step's arguments, to an earlier step's result."""

    index: int


@dataclass(frozen=True)
class Chain:
    """A model as steps; the input has index 0, the result of step ``i`` index ``i + 1``."""

    steps: tuple[Step, ...]
    output: int
    numbers: int = 0
    """Size of the largest layer input or output for one example, in elements."""
    drops: bool = False
    """Whether it has dropout, which draws from torch's default generator."""

    @property
    def layers(self) -> tuple[Dense, ...]:
        """The layers' weights with their biases, in execution order."""
        found: list[Dense] = []
        for step in self.steps:
            if isinstance(step.apply, Dense):
                found.append(step.apply)
            elif isinstance(step.apply, Recurrent):
                found += (step.apply.of_inputs, step.apply.of_states)
        return tuple(found)


@dataclass(frozen=True)
class ForwardPass:
    """A forward pass through the chain, with the tensors that the backward pass needs.

    A dense layer has one row per example, or several as a convolution has. For a `Scale`, inputs
    and results are those of the whole layer.
    """

    output: Tensor
    """Shape ``(K, B, ...)``."""
    inputs: Sequence[Tensor]
    """The factor that each layer's weights multiply, ``(K, B, in)`` or ``(K, B, R, in)``."""
    products: Sequence[Tensor]
    """Each layer's products, ``(K, B, out)`` or ``(K, B, R, out)``."""
    results: Sequence[Tensor]
    """Each layer's results with bias and pooling: ``(K, B, out)`` or ``(K, B, P, out)``."""


Share = tuple[Tensor, Tensor, Tensor]
"""One layer's factors of its gradient: inputs of its product, gradients of the products, and
gradients of the results (with bias), which may be summed over some of their rows. Shapes as in
`ForwardPass`."""


@dataclass(frozen=True)
class BatchGradients:
    """A layer's gradient, summed over each client's whole batch."""

    weight: Tensor
    """Shape ``(K, out, in)``; see `matrix`."""
    bias: Tensor
    """Shape ``(K, out)``; meaningless for a layer without bias."""


@dataclass(frozen=True)
class PerExampleGradients:
    """A layer's per-example gradients."""

    weight: Tensor
    """Shape ``(K, B, out, in)``, see `matrix`; the last two dimensions may be transposed in
    memory."""
    bias: Tensor
    """Shape ``(K, B, out)``; meaningless for a layer without bias."""


Back = Callable[[Tensor], Iterable[Share | BatchGradients | PerExampleGradients]]
"""Maps gradients of a chain's output to each layer's part, in layer order; call it only once. If
examples are kept separate, no part is `BatchGradients`."""


def per_example_part(
    part: Share | BatchGradients | PerExampleGradients,
) -> Share | PerExampleGradients:
    """Narrows the type of a layer's part from a run that keeps examples separate."""
    assert not isinstance(part, BatchGradients)
    return part


def summed(part: PerExampleGradients) -> BatchGradients:
    """Returns the sum over each client's batch."""
    return BatchGradients(part.weight.sum(dim=1), part.bias.sum(dim=1))


Run = Callable[[Weights, Tensor], tuple[Tensor, Back]]
"""Runs ``K`` clients' batches ``(K, B, ...)`` through ``K`` copies of the weights."""


def flattened(x: Tensor) -> Tensor:
    """Flattens ``(K, B, ...)`` to one row per example."""
    return x.flatten(2)


def torch_run(chain: Chain) -> Run:
    """Returns a run of the chain by torch operations, for any chain and device."""

    def run(weights: Weights, x: Tensor) -> tuple[Tensor, Back]:
        passed = run_chain(chain, weights, x)
        return passed.output, lambda grads: _backward(chain, passed, grads)

    return run


def _backward(
    chain: Chain, passed: ForwardPass, grads: Tensor
) -> Iterable[Share | PerExampleGradients]:
    if not passed.output.requires_grad:
        yield from zip(passed.inputs, [grads], [grads], strict=True)
        return
    anchors = [*passed.products, *passed.results]
    found = torch.autograd.grad([passed.output], anchors, [grads])
    half = len(found) // 2
    parts = zip(chain.layers, passed.inputs, found[:half], found[half:], strict=True)
    for layer, inputs, of_products, of_results in parts:
        if isinstance(layer, Scale):
            weight, bias = scale_gradients(inputs, of_results, channels=layer.channels)
            yield PerExampleGradients(weight.unsqueeze(3), bias)
        else:
            yield inputs, of_products, of_results


def stacked(chain: Chain, weights: Weights, clients: int) -> Weights:
    """Returns ``clients`` copies of the weights, in the memory layout that `matrix` needs."""
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
    """Returns stacked copies that share no memory with the tensor, even for one client."""
    return tensor.new_empty((clients, *tensor.shape)).copy_(tensor)


def matrix(layer: Dense, weight: Tensor) -> Tensor:
    """Views a layer's stacked weights ``(K, ...)`` as its product matrices, ``(K, out, in)``."""
    if isinstance(layer, Conv):
        return weight.permute(0, 1, 3, 4, 2).view(*weight.shape[:2], -1)
    return weight.unsqueeze(2) if isinstance(layer, Scale) else weight


def reshape_to_weight(layer: Dense, products: Tensor, weight: Tensor) -> Tensor:
    """Reshapes matrices ``(K, out, in)`` to a layer's stacked weights; the inverse of `matrix`."""
    if isinstance(layer, Conv):
        clients, out, channels, high, wide = weight.shape
        return products.view(clients, out, high, wide, channels).permute(0, 1, 4, 2, 3)
    return products.view(weight.shape)


def run_chain(chain: Chain, weights: Weights, x: Tensor) -> ForwardPass:
    """Runs ``K`` clients' batches through ``K`` copies of the weights.

    Args:
        chain: From `fedcore.training.per_example.graph.find_chain`.
        weights: From `stacked`, by their names in the model; they receive no gradients.
        x: Shape ``(K, B, ...)``.
    """
    places: list[Tensor] = [x]
    inputs: list[Tensor] = []
    products: list[Tensor] = []
    results: list[Tensor] = []
    for step in chain.steps:
        layer = step.apply
        if isinstance(layer, Recurrent):
            a = places[step.args[0].index]
            given, of_states = _dense(layer.of_inputs, weights, a), layer.of_states
            bias = weights[of_states.bias] if of_states.bias else None
            states, before, anchor = unrolled(layer.kind, given, weights[of_states.weight], bias)
            places.append(states)
            inputs += (a.detach(), before)
            products += (given, anchor)
            results += (given, anchor)
            continue
        if not isinstance(layer, Dense):
            args = [places[a.index] if isinstance(a, StepResult) else a for a in step.args]
            places.append(layer(*args, **step.kwargs))
            continue
        a = places[step.args[0].index]
        if isinstance(layer, Conv):
            rows, z, result = _convolved(layer, weights, a)
            cells = layer.window.cells(*a.shape[3:])
            places.append(result.view(*a.shape[:2], *cells, -1).permute(_IMAGE))
        elif isinstance(layer, Scale):
            bias = weights[layer.bias] if layer.bias else None
            found = scaled(a, weights[layer.weight], bias, channels=layer.channels)
            rows, z = a.detach(), _anchored(found)
            result = z
            places.append(result)
        else:
            many = a.flatten(2, -2) if a.dim() > 3 else a
            rows, z = many.detach(), _dense(layer, weights, many)
            result = z
            places.append(result.view(*a.shape[:-1], -1))
        inputs.append(rows)
        products.append(z)
        results.append(result)
    return ForwardPass(places[chain.output], inputs, products, results)


_IMAGE = (0, 1, 4, 2, 3)  # from (K, B, H, W, C) to (K, B, C, H, W)


def _dense(layer: Dense, weights: Weights, a: Tensor) -> Tensor:
    """Applies a dense layer to ``(K, B, in)`` or ``(K, B, R, in)``; its result tracks gradients."""
    weight, rows = weights[layer.weight].transpose(1, 2), a.flatten(1, -2)
    if layer.bias is None:
        found = torch.bmm(rows, weight)
    else:
        found = torch.baddbmm(weights[layer.bias].unsqueeze(1), rows, weight)
    return _anchored(found.view(*a.shape[:-1], -1))


def _convolved(layer: Conv, weights: Weights, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Applies a convolution to ``(K, B, C, H, W)``; returns input patches, products and results.

    The bias is added after pooling, to fewer values: rounding is monotonic, so the largest sum is
    the sum of the largest product.
    """
    window, weight = layer.window, matrix(layer, weights[layer.weight])
    window.check(*image.shape[3:])
    rows = patches(image.detach(), window)
    z = convolved(image.detach(), weight, window)
    if z is None:
        z = products(rows, weight)
    if image.requires_grad:
        z = with_input_gradient(image, z, weight, window)
    z = result = _anchored(z)
    if window.pool != (1, 1):
        result = largest(z.view(*z.shape[:2], math.prod(window.pool), -1, z.shape[3]), 2)
    if layer.bias is not None:
        result = result + weights[layer.bias][:, None, None]
    return rows, z, result


def products(rows: Tensor, weight: Tensor) -> Tensor:
    """Multiplies rows ``(K, B, R, F)`` by weights ``(K, out, F)``; returns ``(K, B, R, out)``.

    On a CPU, a single client's examples are multiplied one by one, so that each stays in a core's
    cache.
    """
    if len(rows) == 1 and not rows.is_cuda:
        each = weight.transpose(1, 2).expand(rows.shape[1], -1, -1)
        return torch.bmm(rows[0], each).unsqueeze(0)
    return torch.bmm(rows.flatten(1, 2), weight.transpose(1, 2)).view(*rows.shape[:3], -1)


def _anchored(z: Tensor) -> Tensor:
    """Makes ``z`` require gradients, if gradients are enabled."""
    if not z.requires_grad and torch.is_grad_enabled():
        z.requires_grad_()
    return z
