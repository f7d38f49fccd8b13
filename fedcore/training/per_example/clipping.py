"""Each example's own gradient of a layer, for DP-SGD: its length, and a weighted sum of all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Gradient:
    """Of one layer, for the first ``k`` clients."""

    left: Tensor
    """``(k, N, p)``."""
    right: Tensor
    """``(k, N, q)``: that of the weight is ``left^T right``, read as the weight's matrix."""
    bias: Tensor
    """``(k, out)``; of no use to a layer without one."""


@dataclass(frozen=True)
class ExampleGradients:
    """Each example's own gradient of one layer."""

    squares: Tensor
    """Squared L2 norms over weight and bias, ``(K, B)``."""
    weighted: Callable[[Tensor], Gradient]
    """The sum of all, each times its share, ``(K, B)``."""


def example_gradients(
    inputs: Tensor, slopes: Tensor, of_results: Tensor, *, bias: bool
) -> ExampleGradients:
    """Those of a layer, by the way that takes the least work.

    Args:
        inputs: What the weights were multiplied with: ``(K, B, in)``, or for a convolution
            ``(K, B, R, in)``.
        slopes: Of what that gave, ``(K, B, out)`` or ``(K, B, R, out)``.
        of_results: Slopes of what came of it, bias added: ``(K, B, out)`` or ``(K, B, P, out)``.
        bias: Whether the layer has one.

    Source:
        Goodfellow 2015, arXiv:1510.01799 (dense layers); Bu et al. 2022, arXiv:2205.10683 (when a
        convolution's norm is had without its gradient).
    """
    if inputs.dim() == 3:
        return _outer(inputs, slopes, bias)
    of_bias = of_results.sum(dim=2)
    rows, numbers = inputs.shape[2:]
    few = 2 * rows * rows < slopes.shape[3] * numbers
    squares, product = (_by_rows if few else _made)(inputs, slopes)
    if bias:
        squares += of_bias.square().sum(dim=2)

    def weighted(share: Tensor) -> Gradient:
        return Gradient(*product(share), torch.bmm(share.unsqueeze(1), of_bias).squeeze(1))

    return ExampleGradients(squares, weighted)


def batch_gradient(inputs: Tensor, slopes: Tensor, of_results: Tensor) -> Gradient:
    """That of a layer over whole batches, whose slopes are weighted already; shapes as above."""
    left, right = slopes.flatten(1, -2), inputs.flatten(1, -2)
    return Gradient(left, right, of_results.flatten(1, -2).sum(dim=1))


def _outer(inputs: Tensor, slopes: Tensor, bias: bool) -> ExampleGradients:
    """One row an example: the norm of an outer product is the product of norms."""
    lengths = torch.linalg.vector_norm(inputs, dim=2).square_()
    squares = slopes.square().sum(dim=2) * (lengths + bias)

    def weighted(share: Tensor) -> Gradient:
        shared = slopes * share.unsqueeze(2)
        return batch_gradient(inputs, shared, shared)

    return ExampleGradients(squares, weighted)


_Factors = Callable[[Tensor], tuple[Tensor, Tensor]]


def _by_rows(inputs: Tensor, slopes: Tensor) -> tuple[Tensor, _Factors]:
    """Few rows, many weights: norms from the products of the rows with each other."""
    a, s = inputs.flatten(0, 1), slopes.flatten(0, 1)
    squares = (torch.bmm(a, a.transpose(1, 2)) * torch.bmm(s, s.transpose(1, 2))).sum(dim=(1, 2))

    def factors(share: Tensor) -> tuple[Tensor, Tensor]:
        return (slopes * share[..., None, None]).flatten(1, 2), inputs.flatten(1, 2)

    return squares.view(inputs.shape[:2]), factors


def _made(inputs: Tensor, slopes: Tensor) -> tuple[Tensor, _Factors]:
    """Many rows, few weights: each gradient is made, and the sum of them costs little then."""
    products = torch.bmm(slopes.flatten(0, 1).transpose(1, 2), inputs.flatten(0, 1))
    each = products.view(*inputs.shape[:2], -1)
    return torch.linalg.vector_norm(each, dim=2).square_(), lambda w: (w.unsqueeze(2), each)
