"""Norms that are believed are right, and those that overflow or cancel are not believed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fedcore.seeds import torch_rng
from fedcore.training.per_example.clipping import (
    ExampleGradients,
    _by_rows,
    _materialise,
    batch_gradient,
    clip_factors,
    example_gradients,
)

K, B, IN, OUT = 2, 5, 6, 4
FEW, MANY = 2, 30  # rows of an example: few leave the gradient unmade
SHAPES = {"dense": (), "few rows": (FEW,), "many rows": (MANY,)}


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch_rng(seed, *shape))


def layer(kind: str) -> tuple[Tensor, Tensor]:
    rows = SHAPES[kind]
    return drawn(K, B, *rows, IN), drawn(K, B, *rows, OUT, seed=1)


def by_hand(inputs: Tensor, grads: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of weight ``(K, B, out, in)`` and bias ``(K, B, out)``, in float64."""
    if inputs.dim() == 3:
        inputs, grads = inputs.unsqueeze(2), grads.unsqueeze(2)
    weight = torch.einsum("kbro,kbri->kboi", grads.double(), inputs.double())
    return weight, grads.double().sum(2)


def check(found: ExampleGradients, weight: Tensor, bias: Tensor, *, has_bias: bool) -> None:
    squares = weight.square().sum((2, 3)) + (bias.square().sum(2) if has_bias else 0)
    assert found.usable.all()
    assert torch.allclose(found.squares.double(), squares, rtol=1e-5)
    share = drawn(K, B, seed=2)
    gradient = found.weighted(share, slice(None))
    product = torch.bmm(gradient.left.transpose(1, 2), gradient.right)
    expected = torch.einsum("kb,kboi->koi", share.double(), weight)
    got = product.double().view(expected.shape)
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()
    if has_bias:
        of_bias = torch.einsum("kb,kbo->ko", share.double(), bias)
        assert (gradient.bias - of_bias).abs().max() <= 1e-5 * of_bias.abs().max()


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("kind", SHAPES)
def test_norms_and_sums_are_those_of_gradients_that_are_made(kind: str, has_bias: bool) -> None:
    inputs, grads = layer(kind)
    found = example_gradients((inputs, grads, grads), bias=has_bias)
    check(found, *by_hand(inputs, grads), has_bias=has_bias)


def test_few_rows_and_many_are_taken_differently_and_alike() -> None:
    inputs, grads = layer("few rows")
    (one, _, _), (other, _, _) = _by_rows(inputs, grads), _materialise(inputs, grads)
    assert torch.allclose(one, other, rtol=1e-5)


def test_a_whole_batchs_gradient_is_the_sum_of_its_examples() -> None:
    for kind in SHAPES:
        inputs, grads = layer(kind)
        found = batch_gradient(inputs, grads, grads)
        weight, bias = (one.sum(1) for one in by_hand(inputs, grads))
        product = torch.bmm(found.left.transpose(1, 2), found.right).double()
        assert torch.allclose(product, weight, atol=1e-4)
        assert torch.allclose(found.bias.double(), bias, atol=1e-4)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("where", ["inputs", "slopes"])
@pytest.mark.parametrize("kind", SHAPES)
def test_an_example_whose_norm_overflows_is_not_believed_and_spoils_no_other(
    kind: str, where: str, value: float
) -> None:
    inputs, grads = layer(kind)
    spoilt = inputs if where == "inputs" else grads
    spoilt[1, 3] = value
    found = example_gradients((inputs, grads, grads), bias=True)
    believed = torch.ones(K, B, dtype=torch.bool)
    believed[1, 3] = False
    assert torch.equal(found.usable, believed)
    fine = example_gradients((*layer(kind), layer(kind)[1]), bias=True)
    assert torch.equal(found.squares[believed], fine.squares[believed])


def test_a_slope_that_would_vanish_beside_a_huge_input_is_not_believed() -> None:
    """1e20 times 1e-40 is 1e-20; but below float32's smallest number 1e-46 is none at all."""
    inputs, grads = torch.full((1, 1, IN), 1e25), torch.full((1, 1, OUT), 1e-30)
    assert not example_gradients((inputs, grads, grads), bias=False).usable.any()


@pytest.mark.parametrize("left", [0.0, 1e-7, 1e-4])
def test_rows_that_cancel_almost_wholly_are_not_believed(left: float) -> None:
    inputs, grads = layer("few rows")
    inputs[0, 2, 1] = inputs[0, 2, 0] * (1 + left)
    grads[0, 2, 1] = -grads[0, 2, 0]
    _, usable, _ = _by_rows(inputs, grads)
    assert not usable[0, 2]
    assert int(usable.sum()) == K * B - 1


def test_rows_that_cancel_in_part_are_believed_and_their_norm_is_right() -> None:
    inputs, grads = layer("few rows")
    inputs[0, 2, 1] = inputs[0, 2, 0] * 1.1
    grads[0, 2, 1] = -grads[0, 2, 0]
    squares, usable, _ = _by_rows(inputs, grads)
    assert usable.all()
    weight, _ = by_hand(inputs, grads)
    assert torch.allclose(squares, weight.square().sum((2, 3)), rtol=1e-6)


def test_an_example_without_a_gradient_is_believed() -> None:
    for kind in SHAPES:
        inputs, grads = layer(kind)
        grads[0, 0] = 0
        found = example_gradients((inputs, grads, grads), bias=True)
        assert found.usable.all()
        assert found.squares[0, 0] == 0


def test_what_is_believed_adds_no_more_than_its_norm_whatever_the_scale() -> None:
    """Random scales of rows, of which many cancel: the sum of one example against its root."""
    rng = torch_rng(9)
    believed = 0
    for _ in range(300):
        scales = 10.0 ** (40 * torch.rand(2, 1, 1, FEW, 1, generator=rng) - 20)
        inputs = torch.randn(1, 1, FEW, IN, generator=rng) * scales[0]
        grads = torch.randn(1, 1, FEW, OUT, generator=rng) * scales[1]
        if torch.rand((), generator=rng) < 0.5:
            inputs[:, :, 1] = inputs[:, :, 0] * (1 + 1e-3 * torch.randn((), generator=rng))
            grads[:, :, 1] = -grads[:, :, 0]
        for take in (_by_rows, _materialise):
            squares, usable, factors = take(inputs, grads)
            if not usable.all():
                continue
            believed += 1
            left, right = factors(torch.ones(1, 1), slice(None))
            length = torch.bmm(left.transpose(1, 2), right).double().norm().item()
            assert length <= squares.sqrt().item() * (1 + 1e-4) + 1e-18  # squares underflow below
    assert believed > 100


def test_shares_scale_to_the_clip_norm_and_never_up() -> None:
    squares = torch.tensor([0.0, 0.25, 1.0, 4.0, 1e30], dtype=torch.float64)
    shares = clip_factors(squares, 1.0)
    assert shares.dtype == torch.float32
    assert shares[:2].tolist() == [1.0, 1.0]
    scaled = shares.double() * squares.sqrt()
    assert (scaled <= 1 + 1e-6).all()
    assert scaled[3:].tolist() == pytest.approx([1.0, 1.0], rel=1e-5)
    each = clip_factors(squares.unsqueeze(0), torch.tensor([[0.5]]))
    assert torch.allclose(
        each[0].double() * squares.sqrt(), squares.sqrt().clamp(max=0.5), rtol=1e-5
    )
