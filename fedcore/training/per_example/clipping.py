"""Norms and weighted sums of a layer's per-example gradients, for DP-SGD.

A server chooses the weights at which gradients are computed, and may choose them so that float32
overflows, underflows or cancels. A norm that is too small would let one example change a sum by
more than the clip norm. Therefore each method states for which examples its norm is reliable.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from fedcore.training.per_example.chain import PerExampleGradients, Share


@dataclass(frozen=True)
class Gradient:
    """A layer's gradient for the first ``k`` clients, with the weight's part in two factors."""

    left: Tensor
    """Shape ``(k, N, p)``."""
    right: Tensor
    """Shape ``(k, N, q)``; the weight matrix's gradient is ``left^T right``."""
    bias: Tensor
    """Shape ``(k, out)``; meaningless for a layer without bias."""


_LARGEST = 1e12
"""Maximum norm of a gradient's factors (activations, output gradients) for a reliable norm. Values
that underflow next to such factors then contribute less than 1e-9."""
_CANCELLED = 32.0
"""Maximum factor by which one example's rows may cancel for a reliable norm. Partial sums over
`EXACT_ROWS` examples can exceed their total by this factor, and are rounded accordingly: adding or
removing an example may flip the rounding of each of the others' rows."""
_SMALLEST = torch.finfo(torch.float32).tiny  # below, a factor may round up to its double
_PIECE = 4096  # elements of a long vector whose norm is computed in float32


@dataclass(frozen=True)
class ExampleGradients:
    """The per-example gradients of one layer."""

    squares: Tensor
    """Squared L2 norms over weight and bias, ``(K, B)``, in float64 where the device supports
    it."""
    usable: Tensor
    """Whether the norm is reliable, ``(K, B)``. Otherwise the scale factor must be zero and the
    inputs must be replaced, as zero times infinity is NaN."""
    weighted: Callable[[Tensor, slice], Gradient]
    """Sums a slice of each client's gradients, each times its scale factor, ``(K, B)``, float32."""


def example_gradients(part: Share | PerExampleGradients, *, bias: bool) -> ExampleGradients:
    """Returns a layer's per-example gradients by the cheapest method.

    Guarantee:
        For a usable example, the L2 norm of what ``weighted`` adds at scale factor 1 is at most the
        root of its entry in ``squares``, up to float32 rounding, for any values.

    Args:
        part: The layer's part of a chain's backward pass.
        bias: Whether the layer has a bias.

    Source:
        Goodfellow 2015, arXiv:1510.01799 (dense layers); Bu et al. 2022, arXiv:2205.10683 (when a
        convolution's norm is computed without its gradient).
    """
    if isinstance(part, PerExampleGradients):
        (squares, usable, product), of_bias = _materialised_part(part.weight), part.bias
    else:
        inputs, grads, of_results = part
        if inputs.dim() == 3:
            return _outer(inputs, grads, bias)
        of_bias = of_results.sum(dim=2)
        rows, numbers = inputs.shape[2:]
        few = 2 * rows * rows < grads.shape[3] * numbers
        squares, usable, product = (_by_rows if few else _materialise)(inputs, grads)
    if bias:
        squares = squares + norms(of_bias).square()

    def weighted(share: Tensor, some: slice) -> Gradient:
        share = share[:, some]
        total = torch.bmm(share.unsqueeze(1), of_bias[:, some]).squeeze(1)
        return Gradient(*product(share, some), total)

    return ExampleGradients(squares, usable & torch.isfinite(squares), weighted)


def zero_unusable(part: Share | PerExampleGradients, usable: Tensor) -> Share | PerExampleGradients:
    """Returns a layer's part with unusable examples, ``(B,)``, set to zero; requires K = 1."""

    def kept(one: Tensor) -> Tensor:
        mask = usable.view(1, -1, *[1] * (one.dim() - 2))
        return torch.where(mask, one, torch.zeros_like(one))

    if isinstance(part, PerExampleGradients):
        return PerExampleGradients(kept(part.weight), kept(part.bias))
    inputs, grads, of_results = part
    return kept(inputs), kept(grads), kept(of_results)


def clip_factors(squares: Tensor, clip_norm: Tensor | float) -> Tensor:
    """Returns float32 scale factors that bound each gradient's norm by ``clip_norm``.

    Args:
        squares: Squared norms over all layers.
        clip_norm: The bound; broadcast against ``squares``.

    Source:
        Abadi et al. 2016, arXiv:1607.00133, Algorithm 1; the added 1e-6 is from Opacus.
    """
    shares: Tensor = clip_norm / (squares.sqrt() + 1e-6)
    return functional.threshold(shares.clamp(max=1).to(torch.float32), _SMALLEST, 0.0)


def batch_gradient(inputs: Tensor, grads: Tensor, of_results: Tensor) -> Gradient:
    """Returns a layer's gradient over whole batches, from already weighted output gradients.

    Args:
        inputs: The factor of the layer's weights, ``(K, B, in)`` or ``(K, B, R, in)``.
        grads: Weighted gradients of the products, ``(K, B, out)`` or ``(K, B, R, out)``.
        of_results: Weighted gradients of the results, ``(K, B, out)`` or ``(K, B, P, out)``.
    """
    left, right = grads.flatten(1, -2), inputs.flatten(1, -2)
    return Gradient(left, right, of_results.flatten(1, -2).sum(dim=1))


def norms(vectors: Tensor) -> Tensor:
    """Returns L2 norms along the last dimension, in float64 (so that squares fit) if supported.

    Long vectors are split into pieces: torch sums squares in float32, which is 0.7 % too small over
    8 million equal entries. Over a piece the error is at most 2e-5.
    """
    wide = torch.float32 if vectors.device.type == "mps" else torch.float64
    whole = vectors.shape[-1] // _PIECE * _PIECE
    rest: Tensor = torch.linalg.vector_norm(vectors[..., whole:], dim=-1).to(wide)
    if not whole:
        return rest
    pieces = vectors[..., :whole].reshape(*vectors.shape[:-1], -1, _PIECE)
    squares: Tensor = torch.linalg.vector_norm(pieces, dim=-1).to(wide).square().sum(dim=-1)
    return (squares + rest.square()).sqrt()


def _outer(inputs: Tensor, grads: Tensor, bias: bool) -> ExampleGradients:
    """Handles one row per example: the norm of an outer product is the product of the norms."""
    of_inputs, of_slopes = norms(inputs), norms(grads)
    squares = of_slopes.square() * (of_inputs.square() + bias)
    usable = (of_inputs <= _LARGEST) & (of_slopes <= _LARGEST)

    def weighted(share: Tensor, some: slice) -> Gradient:
        shared = grads[:, some] * share[:, some].unsqueeze(2)
        return batch_gradient(inputs[:, some], shared, shared)

    return ExampleGradients(squares, usable & torch.isfinite(squares), weighted)


_Factors = Callable[[Tensor, slice], tuple[Tensor, Tensor]]
"""Maps scale factors and a slice of examples to the two factors of their weighted sum."""


def _by_rows(inputs: Tensor, grads: Tensor) -> tuple[Tensor, Tensor, _Factors]:
    """Handles few rows and many weights: computes norms from inner products between the rows.

    These products cancel, as do the rows when summed. So the products are float64, and an example
    whose rows cancel almost entirely is unusable.
    """
    of_inputs, of_slopes = norms(inputs), norms(grads)
    a, s = (one.flatten(0, 1).to(of_inputs.dtype) for one in (inputs, grads))
    squares = (torch.bmm(a, a.transpose(1, 2)) * torch.bmm(s, s.transpose(1, 2))).sum(dim=(1, 2))
    squares = squares.view(inputs.shape[:2]).clamp(min=0)
    lengths = (of_inputs * of_slopes).sum(dim=2)
    usable = lengths <= _CANCELLED * squares.sqrt()
    for one in (of_inputs, of_slopes):
        usable &= (one <= _LARGEST).all(dim=2)

    def factors(share: Tensor, some: slice) -> tuple[Tensor, Tensor]:
        shared = grads[:, some] * share[..., None, None]
        return shared.flatten(1, 2), inputs[:, some].flatten(1, 2)

    return squares, usable, factors


def _materialise(inputs: Tensor, grads: Tensor) -> tuple[Tensor, Tensor, _Factors]:
    """Handles many rows and few weights: materialises each gradient, which makes the sum cheap.

    The narrower factor comes first: with few columns in one factor, the other order takes up to
    four times as long. The sum over examples is transposed instead.
    """
    turned = inputs.shape[3] < grads.shape[3]
    first, second = (inputs, grads) if turned else (grads, inputs)
    products = torch.bmm(first.flatten(0, 1).transpose(1, 2), second.flatten(0, 1))
    each = products.view(*inputs.shape[:2], *products.shape[1:])
    return _materialised_part(each.transpose(2, 3) if turned else each)


def _materialised_part(each: Tensor) -> tuple[Tensor, Tensor, _Factors]:
    """Handles materialised gradients, ``(K, B, out, in)``."""
    turned = not each.is_contiguous()
    kept = each.transpose(2, 3) if turned else each
    flat = kept.flatten(2)
    squares = norms(flat).square()

    def factors(share: Tensor, some: slice) -> tuple[Tensor, Tensor]:
        if not turned:
            return share.unsqueeze(2), flat[:, some]
        total = torch.bmm(share.unsqueeze(1), flat[:, some]).view(-1, *kept.shape[2:])
        right = total.transpose(1, 2).reshape(len(total), 1, -1)
        return right.new_ones(len(total), 1, 1), right

    return squares, torch.isfinite(squares), factors
