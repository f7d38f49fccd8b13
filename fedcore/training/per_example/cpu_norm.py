"""Runs normalisations with their weight, bias and ReLU on the CPU, forward and backward."""

from __future__ import annotations

import torch
from torch import Tensor

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


def group_norm(layer: GroupNormalised, scales: Scale, *, relu: bool, per_example: bool) -> Link:
    """Returns a link that normalises groups of channels, scales and shifts, by compiled loops.

    Args:
        layer: The normalisation.
        scales: Its weight and bias.
        relu: Whether a ReLU follows.
        per_example: Whether the backward pass keeps examples separate.
    """
    from fedcore.kernels import group_norm as loops  # compiles on first use

    def link(weights: Weights, x: Tensor) -> tuple[Tensor, Backward]:
        assert scales.bias is not None  # others are not run by these loops
        weight, bias = weights[scales.weight], weights[scales.bias]
        if x.shape[2] != weight.shape[1] or x.shape[2] % layer.groups:  # before a loop reads
            raise ValueError(
                f"{x.shape[2]} channels, but {weight.shape[1]} in {layer.groups} groups"
            )
        images = x.movedim(2, -1).contiguous()
        rows = images.view(*images.shape[:2], -1, images.shape[-1])
        result, moments = torch.empty_like(images), x.new_empty((*x.shape[:2], 2, x.shape[2]))
        found = result.view(rows.shape)
        loops.forward(
            rows.numpy(), weight.contiguous().numpy(), bias.contiguous().numpy(), found.numpy(),
            moments.numpy(), layer.groups, layer.eps, relu,
        )  # fmt: skip

        def backward(grads: Tensor) -> tuple[Tensor, BatchGradients | PerExampleGradients]:
            given = grads.movedim(2, -1).contiguous().view(rows.shape)
            if relu and given.data_ptr() == grads.data_ptr():
                given = given.clone()  # the loop overwrites it
            of_images, of_weights = torch.empty_like(images), torch.empty_like(moments)
            loops.backward(
                rows.numpy(), weight.contiguous().numpy(), found.numpy(), moments.numpy(),
                given.numpy(), of_images.view(rows.shape).numpy(), of_weights.numpy(),
                layer.groups, relu,
            )  # fmt: skip
            part = PerExampleGradients(of_weights[:, :, 0].unsqueeze(3), of_weights[:, :, 1])
            return of_images.movedim(-1, 2), part if per_example else summed(part)

        return result.movedim(-1, 2), backward

    return link


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
