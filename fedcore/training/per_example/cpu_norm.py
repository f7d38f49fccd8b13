"""Runs normalisations with their weight, bias and ReLU on the CPU, forward and backward."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fedcore.kernels.window import Pair
from fedcore.training.per_example.chain import (
    BatchGradients,
    PerExampleGradients,
    Scale,
    Weights,
    summed,
)
from fedcore.training.per_example.cpu_conv import Backward, Link
from fedcore.training.per_example.modules import GroupNormalised
from fedcore.training.per_example.scales import scale_gradients, scaled


def group_norm(
    layer: GroupNormalised, scales: Scale, *, relu: bool, pool: Pair, per_example: bool
) -> Link:
    """Returns a link that normalises groups of channels, scales and shifts, by compiled loops.

    Args:
        layer: The normalisation.
        scales: Its weight and bias.
        relu: Whether a ReLU follows.
        pool: Block of the max-pooling that follows; (1, 1) without.
        per_example: Whether the backward pass keeps examples separate.
    """
    from fedcore.kernels.group_norm import compile_group_norm  # compiles on first use

    def link(weights: Weights, x: Tensor) -> tuple[Tensor, Backward]:
        assert scales.bias is not None  # others are not run by these loops
        weight = weights[scales.weight].contiguous().numpy()
        bias = weights[scales.bias].contiguous().numpy()
        images = x.movedim(2, -1).contiguous()
        sides, shape = _pooled(x, pool)
        if x.shape[2] != weight.shape[1] or x.shape[2] % layer.groups:  # before a loop reads
            raise ValueError(
                f"{x.shape[2]} channels, but {weight.shape[1]} in {layer.groups} groups"
            )
        loops = compile_group_norm(x.shape[2], *pool)
        blocks = (sides[0] // pool[0], sides[1] // pool[1], *pool)
        given = images.view(*x.shape[:2], *sides, x.shape[2]).numpy()
        result, moments = x.new_empty(shape), x.new_empty((*x.shape[:2], 2, x.shape[2]))
        found = result.view(*x.shape[:2], -1, x.shape[2]).numpy()
        places = torch.empty(found.shape, dtype=torch.uint8).numpy()
        loops.forward(
            given, weight, bias, found, places, moments.numpy(), layer.groups, layer.eps, blocks,
            relu,
        )  # fmt: skip

        def backward(grads: Tensor) -> tuple[Tensor, BatchGradients | PerExampleGradients]:
            of_result = grads.movedim(2, -1).contiguous().view(found.shape).numpy()
            of_images, of_weights = torch.empty_like(images), torch.empty_like(moments)
            loops.backward(
                given, weight, places, moments.numpy(), of_result,
                of_images.view(given.shape).numpy(), of_weights.numpy(), layer.groups, blocks,
            )  # fmt: skip
            part = PerExampleGradients(of_weights[:, :, 0].unsqueeze(3), of_weights[:, :, 1])
            return of_images.movedim(-1, 2), part if per_example else summed(part)

        return result.movedim(-1, 2), backward

    return link


def _pooled(x: Tensor, pool: Pair) -> tuple[Pair, tuple[int, ...]]:
    """Returns the sides of images ``(K, B, C, ...)``, and their shape when pooled, channels last.

    Raises:
        ValueError: The images are too small for pooling, or are none.
    """
    if pool == (1, 1):
        return (math.prod(x.shape[3:]), 1), (*x.shape[:2], *x.shape[3:], x.shape[2])
    sides = tuple(x.shape[3:])
    if len(sides) != 2 or sides[0] < pool[0] or sides[1] < pool[1]:
        raise ValueError(f"images of {sides} cannot be pooled in blocks of {pool}")
    down, across = sides[0] // pool[0], sides[1] // pool[1]
    return (sides[0], sides[1]), (*x.shape[:2], down, across, x.shape[2])


def scale(layer: Scale, *, relu: bool, per_example: bool) -> Link:
    """Returns a link that multiplies by a weight and adds a bias; arguments as for `group_norm`."""

    def link(weights: Weights, x: Tensor) -> tuple[Tensor, Backward]:
        weight = weights[layer.weight]
        bias = weights[layer.bias] if layer.bias else None
        result = scaled(x, weight, bias, channels=layer.channels)
        if relu:
            result.relu_()

        def backward(grads: Tensor) -> tuple[Tensor, BatchGradients | PerExampleGradients]:
            if relu:
                grads = torch.ops.aten.threshold_backward(grads, result, 0)
            of_weight, of_bias = scale_gradients(x, grads, channels=layer.channels)
            part = PerExampleGradients(of_weight.unsqueeze(3), of_bias)
            back = scaled(grads, weight, None, channels=layer.channels)
            return back, part if per_example else summed(part)

        return result, backward

    return link
