"""A group normalisation with its ReLU and pooling is torch's, forward and backward."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from fedcore.training.per_example.chain import (
    BatchGradients,
    PerExampleGradients,
    Scale,
    per_example_part,
    stacked,
)
from fedcore.training.per_example.cpu import kernel_run
from fedcore.training.per_example.cpu_norm import group_norm
from fedcore.training.per_example.graph import find_chain
from fedcore.training.per_example.modules import GroupNormalised

SCALES = Scale("w", "b", channels=True)
SHAPES = {  # channels, groups, pooling, shape of an image
    "no pooling": (8, 2, (1, 1), (7, 5)),
    "pooling that leaves a row and a column": (8, 4, (2, 2), (7, 5)),
    "blocks that are not square, and channels that fill no vector": (12, 3, (3, 2), (9, 8)),
    "one group": (8, 1, (2, 2), (6, 6)),
    "as many groups as channels": (8, 8, (2, 2), (6, 6)),
    "no images": (8, 2, (1, 1), (9,)),
}
Shape = tuple[int, int, tuple[int, int], tuple[int, ...]]


def by_torch(x: Tensor, weight: Tensor, bias: Tensor, shape: Shape, *, relu: bool) -> Tensor:
    """One client's, ``(B, C, ...)``."""
    result = functional.group_norm(x, shape[1], weight, bias, 1e-5)
    result = torch.relu(result) if relu else result
    return functional.max_pool2d(result, shape[2]) if shape[2] != (1, 1) else result


@pytest.mark.parametrize("equal", [False, True], ids=["any values", "equal values"])
@pytest.mark.parametrize("per_example", [False, True])
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_values_and_gradients(shape: Shape, relu: bool, per_example: bool, equal: bool) -> None:
    channels, groups, pool, size = shape
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, channels, *size, generator=rng) + 0.5
    if equal:  # so the first of a block is the largest
        x = torch.ones_like(x)
    weights = {name: torch.randn(2, channels, generator=rng) for name in "wb"}  # negative, too
    link = group_norm(
        GroupNormalised(groups, 1e-5), SCALES, relu=relu, pool=pool, per_example=per_example
    )
    found, backward = link(weights, x)
    grads = torch.randn(found.shape, generator=rng)
    of_x, part = backward(grads)
    for client in range(2):
        image = x[client].double().requires_grad_()
        leaves = [
            one[client].double().expand(3, -1).clone().requires_grad_() for one in weights.values()
        ]
        expected = torch.cat(
            [
                by_torch(image[b : b + 1], leaves[0][b], leaves[1][b], shape, relu=relu)
                for b in range(3)
            ]
        )
        back = torch.autograd.grad([expected], [image, *leaves], [grads[client].double()])
        torch.testing.assert_close(found[client], expected.detach().float())
        scale = float(back[0].abs().max())
        torch.testing.assert_close(of_x[client], back[0].float(), rtol=1e-4, atol=1e-5 * scale)
        if per_example:
            assert isinstance(part, PerExampleGradients)
            mine = part.weight[client].squeeze(2), part.bias[client]
        else:
            assert isinstance(part, BatchGradients)
            mine = part.weight[client].squeeze(1), part.bias[client]
            back = (back[0], back[1].sum(0), back[2].sum(0))
        for one, other in zip(mine, back[1:], strict=True):
            torch.testing.assert_close(one, other.float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("relu", [False, True])
def test_what_is_no_number_stays_in_its_example_and_group(relu: bool) -> None:
    shape = SHAPES["pooling that leaves a row and a column"]
    x = torch.randn(1, 3, 8, 7, 5, generator=torch.Generator().manual_seed(0))
    x[0, 1, 0, 3, 2] = float("nan")
    weights = {name: torch.ones(1, 8) for name in "wb"}
    layer = GroupNormalised(shape[1], 1e-5)
    found, _ = group_norm(layer, SCALES, relu=relu, pool=shape[2], per_example=False)(weights, x)
    expected = by_torch(x[0], weights["w"][0], weights["b"][0], shape, relu=relu)
    assert torch.equal(found[0].isnan(), expected.isnan())
    assert found[0, 1, :2].isnan().all()
    assert found.isnan().sum() == 2 * 3 * 2


@pytest.mark.parametrize(
    "behind",
    [
        [nn.ReLU(), nn.MaxPool2d(2)],
        [nn.MaxPool2d(2), nn.ReLU()],
        [nn.MaxPool2d(2)],
        [nn.ReLU(), nn.MaxPool2d(2), nn.ReLU(), nn.MaxPool2d(2)],
        [nn.MaxPool2d(2), nn.MaxPool2d(2), nn.ReLU()],
        [nn.ReLU(), nn.MaxPool2d(3, stride=2)],
        [nn.Tanh(), nn.MaxPool2d(2)],
    ],
    ids=lambda layers: ", ".join(str(layer) for layer in layers),
)
def test_in_a_model_with_what_follows_in_any_order(behind: list[nn.Module]) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 8, 3), nn.GroupNorm(2, 8), *behind, nn.Flatten())
    x = torch.randn(2, 3, 2, 15, 15)
    chain = find_chain(net, x[0])
    assert chain is not None
    run = kernel_run(chain, per_example=True)
    assert run is not None
    start = {name: p.detach() for name, p in net.named_parameters()}
    found, backward = run(stacked(chain, start, 2), x)
    grads = torch.randn(found.shape)
    parts = [per_example_part(one) for one in backward(grads)]
    scales = parts[1]
    assert isinstance(scales, PerExampleGradients)
    for client in range(2):
        expected = net(x[client])
        torch.testing.assert_close(found[client], expected.detach(), rtol=1e-4, atol=1e-5)
        of_weight, of_bias = torch.autograd.grad(
            [expected], [net[1].weight, net[1].bias], [grads[client]]
        )
        torch.testing.assert_close(
            scales.weight[client].sum(0).flatten(), of_weight, rtol=1e-4, atol=1e-4
        )
        torch.testing.assert_close(scales.bias[client].sum(0), of_bias, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "shape",
    [(1, 2, 8, 1, 6), (1, 2, 8, 6, 0), (1, 2, 8, 12), (1, 2, 4, 6, 6), (1, 2, 9, 6, 6)],
)
def test_images_that_cannot_be_pooled_or_have_other_channels_are_refused(
    shape: tuple[int, ...],
) -> None:
    weights = {name: torch.ones(1, 8) for name in "wb"}
    link = group_norm(GroupNormalised(2, 1e-5), SCALES, relu=True, pool=(2, 2), per_example=False)
    assert link(weights, torch.randn(1, 2, 8, 6, 6))[0].shape == (1, 2, 8, 3, 3)
    with pytest.raises(ValueError, match=r"cannot be pooled|channels"):
        link(weights, torch.randn(*shape))
