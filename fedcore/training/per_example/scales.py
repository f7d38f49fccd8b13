"""The weight and bias that follow a normalisation, for many clients' batches.

Shapes: ``(K, B, C, ...)`` with one weight per channel, or ``(K, B, ..., C)`` with one per value.
"""

from __future__ import annotations

import torch
from torch import Tensor


def scaled(a: Tensor, weight: Tensor, bias: Tensor | None, *, channels: bool) -> Tensor:
    """Multiplies by a weight ``(K, C)`` and adds a bias ``(K, C)``."""
    before, behind = (1, a.dim() - 3) if channels else (a.dim() - 2, 0)
    shape = (len(a), *[1] * before, -1, *[1] * behind)
    if bias is None:
        return a * weight.view(shape)
    return torch.addcmul(bias.view(shape), a, weight.view(shape))


def scale_gradients(inputs: Tensor, grads: Tensor, *, channels: bool) -> tuple[Tensor, Tensor]:
    """Returns per-example gradients of weight and bias, ``(K, B, C)`` each.

    Args:
        inputs: What the weight multiplies.
        grads: The gradients of the results, of the same shape.
        channels: Whether the third dimension, not the last, is that of the weight.
    """
    if not channels:
        inputs, grads = inputs.movedim(-1, 2), grads.movedim(-1, 2)
    inputs, grads = (one.reshape(*one.shape[:3], -1) for one in (inputs, grads))
    return (inputs * grads).sum(dim=3), grads.sum(dim=3)
