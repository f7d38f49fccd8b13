"""Each example's own gradient of a layer, for DP-SGD: its norm, and a weighted sum over examples.

A server chooses the weights that gradients are taken at, and may choose them so that float32
overflows, underflows or cancels. A norm that comes out too small would let one example move a sum
by more than the clip norm. So each way states for which examples its norm is to be believed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from fedcore.training.per_example.chain import Each, Share


@dataclass(frozen=True)
class Gradient:
    """Of one layer, for the first ``k`` clients."""

    left: Tensor
    """``(k, N, p)``."""
    right: Tensor
    """``(k, N, q)``: that of the weight is ``left^T right``, read as the weight's matrix."""
    bias: Tensor
    """``(k, out)``; of no use to a layer without one."""


_LARGEST = 1e12
"""Factors of a gradient (activations, gradients by outputs) with larger norms are not believed:
what underflows beside them is then below 1e-9."""
_CANCELLED = 32.0
"""Rows of one example that cancel by more than this factor are not believed. Over `EXACT_ROWS`
examples partial sums are up to so many times as long as their sum, and are rounded to that: with
one example more or less each row of the others may be rounded the other way."""
_SMALLEST = torch.finfo(torch.float32).tiny  # below, a share may be rounded up to twice itself
_PIECE = 4096  # of a long vector, whose norm is taken in float32


@dataclass(frozen=True)
class ExampleGradients:
    """Each example's own gradient of one layer."""

    squares: Tensor
    """Squared L2 norms over weight and bias, ``(K, B)``, float64 where the device has it."""
    usable: Tensor
    """Whether the norm is to be believed, ``(K, B)``; elsewhere the share must be zero, and the
    inputs must be replaced, as zero times infinity is no number."""
    weighted: Callable[[Tensor, slice], Gradient]
    """The sum of some of each client's, each times its share, ``(K, B)``, float32."""


def example_gradients(part: Share | Each, *, bias: bool) -> ExampleGradients:
    """Those of a layer, by the way that takes the least work.

    Guarantee:
        For a usable example the L2 norm of what ``weighted`` adds for it, at share 1, is at most
        the root of its square up to float32 rounding, whatever the values are.

    Args:
        part: What a chain's way back leaves of the layer.
        bias: Whether the layer has one.

    Source:
        Goodfellow 2015, arXiv:1510.01799 (dense layers); Bu et al. 2022, arXiv:2205.10683 (when a
        convolution's norm is had without its gradient).
    """
    if isinstance(part, Each):
        (squares, usable, product), of_bias = _given(part.weight), part.bias
    else:
        inputs, slopes, of_results = part
        if inputs.dim() == 3:
            return _outer(inputs, slopes, bias)
        of_bias = of_results.sum(dim=2)
        rows, numbers = inputs.shape[2:]
        few = 2 * rows * rows < slopes.shape[3] * numbers
        squares, usable, product = (_by_rows if few else _made)(inputs, slopes)
    if bias:
        squares = squares + norms(of_bias).square()

    def weighted(share: Tensor, some: slice) -> Gradient:
        share = share[:, some]
        total = torch.bmm(share.unsqueeze(1), of_bias[:, some]).squeeze(1)
        return Gradient(*product(share, some), total)

    return ExampleGradients(squares, usable & torch.isfinite(squares), weighted)


def without(part: Share | Each, usable: Tensor) -> Share | Each:
    """A layer's part with zeros in place of all examples that are not usable, ``(B,)``; K is 1."""

    def kept(one: Tensor) -> Tensor:
        mask = usable.view(1, -1, *[1] * (one.dim() - 2))
        return torch.where(mask, one, torch.zeros_like(one))

    if isinstance(part, Each):
        return Each(kept(part.weight), kept(part.bias))
    inputs, slopes, of_results = part
    return kept(inputs), kept(slopes), kept(of_results)


def shares_of(squares: Tensor, clip_norm: Tensor | float) -> Tensor:
    """What to multiply gradients with so that none is longer than ``clip_norm``, float32.

    Args:
        squares: Squared norms over all layers.
        clip_norm: The bound; broadcast against ``squares``.

    Source:
        Abadi et al. 2016, arXiv:1607.00133, Algorithm 1; the added 1e-6 is that of Opacus.
    """
    shares: Tensor = clip_norm / (squares.sqrt() + 1e-6)
    return functional.threshold(shares.clamp(max=1).to(torch.float32), _SMALLEST, 0.0)


def batch_gradient(inputs: Tensor, slopes: Tensor, of_results: Tensor) -> Gradient:
    """That of a layer over whole batches, whose slopes are weighted already; shapes as above."""
    left, right = slopes.flatten(1, -2), inputs.flatten(1, -2)
    return Gradient(left, right, of_results.flatten(1, -2).sum(dim=1))


def norms(vectors: Tensor) -> Tensor:
    """L2 norms along the last dimension, in float64 where there is one, so squares fit.

    Long vectors are taken in pieces: torch adds up squares in float32, and over 8 million equal
    entries that comes out 0.7 % too small. Over a piece it is at most 2e-5.
    """
    wide = torch.float32 if vectors.device.type == "mps" else torch.float64
    whole = vectors.shape[-1] // _PIECE * _PIECE
    rest: Tensor = torch.linalg.vector_norm(vectors[..., whole:], dim=-1).to(wide)
    if not whole:
        return rest
    pieces = vectors[..., :whole].reshape(*vectors.shape[:-1], -1, _PIECE)
    squares: Tensor = torch.linalg.vector_norm(pieces, dim=-1).to(wide).square().sum(dim=-1)
    return (squares + rest.square()).sqrt()


def _outer(inputs: Tensor, slopes: Tensor, bias: bool) -> ExampleGradients:
    """One row an example: the norm of an outer product is the product of norms."""
    of_inputs, of_slopes = norms(inputs), norms(slopes)
    squares = of_slopes.square() * (of_inputs.square() + bias)
    usable = (of_inputs <= _LARGEST) & (of_slopes <= _LARGEST)

    def weighted(share: Tensor, some: slice) -> Gradient:
        shared = slopes[:, some] * share[:, some].unsqueeze(2)
        return batch_gradient(inputs[:, some], shared, shared)

    return ExampleGradients(squares, usable & torch.isfinite(squares), weighted)


_Factors = Callable[[Tensor, slice], tuple[Tensor, Tensor]]
"""From the shares of some examples, and which they are, to the factors of their sum."""


def _by_rows(inputs: Tensor, slopes: Tensor) -> tuple[Tensor, Tensor, _Factors]:
    """Few rows, many weights: norms from the products of the rows with each other.

    These products cancel, and so do the rows when they are summed up: the products are taken in
    float64, and an example whose rows cancel almost wholly is not used.
    """
    of_inputs, of_slopes = norms(inputs), norms(slopes)
    a, s = (one.flatten(0, 1).to(of_inputs.dtype) for one in (inputs, slopes))
    squares = (torch.bmm(a, a.transpose(1, 2)) * torch.bmm(s, s.transpose(1, 2))).sum(dim=(1, 2))
    squares = squares.view(inputs.shape[:2]).clamp(min=0)
    lengths = (of_inputs * of_slopes).sum(dim=2)
    usable = lengths <= _CANCELLED * squares.sqrt()
    for one in (of_inputs, of_slopes):
        usable &= (one <= _LARGEST).all(dim=2)

    def factors(share: Tensor, some: slice) -> tuple[Tensor, Tensor]:
        shared = slopes[:, some] * share[..., None, None]
        return shared.flatten(1, 2), inputs[:, some].flatten(1, 2)

    return squares, usable, factors


def _made(inputs: Tensor, slopes: Tensor) -> tuple[Tensor, Tensor, _Factors]:
    """Many rows, few weights: each gradient is made, and the sum of them costs little then.

    The narrower of the two factors stands first: the other way round takes up to four times as long
    where one has few columns, and the sum over examples is turned round instead.
    """
    turned = inputs.shape[3] < slopes.shape[3]
    first, second = (inputs, slopes) if turned else (slopes, inputs)
    products = torch.bmm(first.flatten(0, 1).transpose(1, 2), second.flatten(0, 1))
    each = products.view(*inputs.shape[:2], *products.shape[1:])
    return _given(each.transpose(2, 3) if turned else each)


def _given(each: Tensor) -> tuple[Tensor, Tensor, _Factors]:
    """From the gradients themselves, ``(K, B, out, in)``."""
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
