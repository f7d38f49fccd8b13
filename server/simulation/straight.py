"""A chain of convolutions without branches, run forth and back by compiled kernels.

What autograd would keep of each operation, and call one by one on the way back, is written out here
for whole layers: rows, product, pooling, bias, and the ReLU behind them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from server.simulation.chain import (
    Back,
    Chain,
    Conv,
    Dense,
    Place,
    Run,
    Share,
    Step,
    Weights,
    flattened,
    matrix,
)
from server.simulation.graph import is_relu
from server.simulation.kernels import (
    MOST,
    blocks_of,
    fold_rows,
    lay_rows,
    lay_short_rows,
    look_of,
    pool,
    unpool,
)

_SHORT = 16  # numbers: where a kernel's line has fewer, rows are quicker laid column by column
_CHANNELS_LAST, _CHANNELS_FIRST = (0, 1, 3, 4, 2), (0, 1, 4, 2, 3)

_Undo = Callable[[Tensor], tuple[Tensor, Share | None]]
"""From slopes of what a link gave: those of what it was given, and its layer's share in them. To be
called once, and of a chain's first layer only the share counts."""
_Link = Callable[[Weights, Tensor], tuple[Tensor, _Undo]]
"""Runs a part of a chain: what it gives, and the way back."""


def by_kernels(chain: Chain) -> Run | None:
    """Runs a chain with float32 weights on the CPU; None where that is better left to torch.

    So it is without convolutions, and where a result is used twice.
    """
    windows = [layer.window for layer in chain.layers if isinstance(layer, Conv)]
    apart = all(window.pool[0] * window.pool[1] <= MOST for window in windows)
    if not windows or not apart or not _is_straight(chain):
        return None
    steps = [step for step in chain.steps if type(step.apply) is not nn.Identity]
    first = next(place for place, step in enumerate(steps) if isinstance(step.apply, Dense))
    links = list(_links(steps[first:]))

    def run(weights: Weights, x: Tensor) -> tuple[Tensor, Back]:
        with torch.no_grad():
            for step in steps[:first]:
                x = _applied(step, x)
            undos = []
            for link in links:
                x, undo = link(weights, x)
                undos.append(undo)
        return x, lambda slopes: _back(undos, slopes)

    return run


def _back(undos: Sequence[_Undo], slopes: Tensor) -> Sequence[Share]:
    shares = []
    for undo in reversed(undos):
        slopes, share = undo(slopes)
        if share is not None:
            shares.append(share)
    return shares[::-1]


def _is_straight(chain: Chain) -> bool:
    """Whether each step is given what the one before it gave, and that alone."""
    given = [[one for one in step.args if isinstance(one, Place)] for step in chain.steps]
    in_turn = all(places == [Place(number)] for number, places in enumerate(given))
    return in_turn and chain.output == len(chain.steps)


def _links(steps: Sequence[Step]) -> Iterator[_Link]:
    """Layers with the ReLU behind them, and whatever else there is; the first is a layer."""
    behind = [*(is_relu(step.apply) for step in steps[1:]), False]
    taken = False
    for place, (step, relu) in enumerate(zip(steps, behind, strict=True)):
        layer = step.apply
        if taken:
            taken = False
        elif isinstance(layer, Conv):
            yield _convolution(layer, relu=relu, first=place == 0)
            taken = relu
        elif isinstance(layer, Dense):
            yield _dense(layer, relu=relu, first=place == 0)
            taken = relu
        else:
            yield _flat if layer is flattened else _any(step)


def _applied(step: Step, x: Tensor) -> Tensor:
    assert not isinstance(step.apply, Dense)
    args = [x if isinstance(one, Place) else one for one in step.args]
    return step.apply(*args, **step.kwargs)


def _any(step: Step) -> _Link:
    """Has autograd find the way back."""

    def link(weights: Weights, x: Tensor) -> tuple[Tensor, _Undo]:
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            result = _applied(step, leaf)

        def undo(slopes: Tensor) -> tuple[Tensor, None]:
            (found,) = torch.autograd.grad([result], [leaf], [slopes])
            return found, None

        return result.detach(), undo

    return link


def _flat(weights: Weights, x: Tensor) -> tuple[Tensor, _Undo]:
    return flattened(x), lambda slopes: (slopes.view(x.shape), None)


def _dense(layer: Dense, *, relu: bool, first: bool) -> _Link:
    def link(weights: Weights, x: Tensor) -> tuple[Tensor, _Undo]:
        weight = weights[layer.weight]
        if layer.bias is None:
            result = torch.bmm(x, weight.transpose(1, 2))
        else:
            result = torch.baddbmm(weights[layer.bias].unsqueeze(1), x, weight.transpose(1, 2))
        if relu:
            result.relu_()

        def undo(slopes: Tensor) -> tuple[Tensor, Share]:
            if relu:
                slopes = torch.ops.aten.threshold_backward(slopes, result, 0)
            return slopes if first else torch.bmm(slopes, weight), (x, slopes, slopes)

        return result, undo

    return link


def _convolution(layer: Conv, *, relu: bool, first: bool) -> _Link:
    """With its pooling. Products are held in the order of an image, ``(K, B * results, out)``."""
    lines, across = layer.window.kernel

    def link(weights: Weights, x: Tensor) -> tuple[Tensor, _Undo]:
        clients, batch, channels, height, width = x.shape
        weight = matrix(layer, weights[layer.weight])
        outs = weight.shape[1]
        look = look_of(layer.window, height, width, channels)
        blocks = blocks_of(layer.window, height, width)
        x = x.permute(_CHANNELS_LAST).contiguous()
        # As many as will be written: of other images than the layer's, the product is refused.
        rows = x.new_empty((clients, batch * look[-2] * look[-1], lines * across * channels))
        lay = lay_rows if across * channels >= _SHORT else lay_short_rows
        lay(_flat_array(x), _flat_array(rows), look)
        products = torch.bmm(rows, weight.transpose(1, 2))
        bias = x.new_zeros((clients, outs)) if layer.bias is None else weights[layer.bias]
        result = x.new_empty((clients, batch, *blocks[:2], outs))
        places = torch.empty(result.shape, dtype=torch.uint8)
        of_places = places.view(-1, outs).numpy()
        pool(_rows(products), bias.numpy(), _rows(result), of_places, blocks, relu)

        def undo(slopes: Tensor) -> tuple[Tensor, Share]:
            of_result = _rows(slopes.permute(_CHANNELS_LAST).contiguous())
            of_bias = slopes.new_empty((clients, batch, 1, outs))
            of_products = products  # nobody reads them again
            unpool(of_result, of_places, _rows(of_products), _rows(of_bias), blocks)
            apart = (clients, batch, -1)
            share = rows.view(*apart, rows.shape[2]), of_products.view(*apart, outs), of_bias
            if first:
                return slopes, share
            of_rows = torch.bmm(of_products, weight)
            of_images = torch.empty_like(x)
            fold_rows(_flat_array(of_rows), _flat_array(of_images), look)
            return of_images.permute(_CHANNELS_FIRST), share

        return result.permute(_CHANNELS_FIRST), undo

    return link


def _flat_array(tensor: Tensor) -> Any:
    return tensor.view(-1).numpy()


def _rows(tensor: Tensor) -> Any:
    return tensor.view(-1, tensor.shape[-1]).numpy()
