"""Runs a straight chain of convolutions on the CPU, forward and backward, by compiled kernels.

Where autograd stores every operation and replays each one, this code handles whole layers: patches,
product, pooling, bias and the ReLU that follows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from fedcore.kernels.im2col import MAX_WINDOW
from fedcore.training.per_example.chain import (
    Back,
    BatchGradients,
    Chain,
    Conv,
    Dense,
    PerExampleGradients,
    Recurrent,
    Run,
    Scale,
    Share,
    Step,
    StepResult,
    Weights,
    flattened,
)
from fedcore.training.per_example.cpu_conv import Backward, Link, convolution
from fedcore.training.per_example.cpu_norm import group_norm, scale
from fedcore.training.per_example.graph import is_relu, pooling_block
from fedcore.training.per_example.modules import GroupNormalised


def kernel_run(chain: Chain, *, per_example: bool) -> Run | None:
    """Returns a run of the chain by float32 kernels on the CPU; None where torch is better.

    That is the case without convolutions, with very large pooling blocks, and where a result is
    used twice.

    Args:
        chain: From `fedcore.training.per_example.graph.find_chain`.
        per_example: Whether the backward pass keeps examples separate, for per-example gradients.
    """
    windows = [layer.window for layer in chain.layers if isinstance(layer, Conv)]
    few = all(window.pool[0] * window.pool[1] <= MAX_WINDOW for window in windows)
    if not windows or not few or not _is_straight(chain):
        return None
    if any(isinstance(step.apply, Recurrent) for step in chain.steps):
        return None
    steps = [step for step in chain.steps if type(step.apply) is not nn.Identity]
    first = next(place for place, step in enumerate(steps) if isinstance(step.apply, Dense))
    links = list(_links(steps[first:], per_example=per_example))

    def run(weights: Weights, x: Tensor) -> tuple[Tensor, Back]:
        with torch.no_grad():
            for step in steps[:first]:
                x = _applied(step, x)
            backwards = []
            for link in links:
                x, backward = link(weights, x)
                backwards.append(backward)
        return x, lambda grads: _backward(backwards, grads)

    return run


def _backward(
    backwards: Sequence[Backward], grads: Tensor
) -> Sequence[Share | BatchGradients | PerExampleGradients]:
    shares: list[Share | BatchGradients | PerExampleGradients] = []
    for backward in reversed(backwards):
        grads, share = backward(grads)
        if share is not None:
            shares.append(share)
    return shares[::-1]


def _is_straight(chain: Chain) -> bool:
    """Returns whether each step reads the previous step's result, and no other."""
    given = [[one for one in step.args if isinstance(one, StepResult)] for step in chain.steps]
    in_turn = all(places == [StepResult(number)] for number, places in enumerate(given))
    return in_turn and chain.output == len(chain.steps)


def _links(steps: Sequence[Step], *, per_example: bool) -> Iterator[Link]:
    """Yields the steps as links, each layer with the ReLU that follows; a layer must come first."""
    place = 0
    while place < len(steps):
        layer, behind = steps[place].apply, steps[place + 1 :]
        scales = behind[0].apply if behind and isinstance(layer, GroupNormalised) else None
        if isinstance(scales, Scale) and scales.bias is not None:
            behind = behind[1:]
        else:
            scales = None
        relu = bool(behind) and is_relu(behind[0].apply)
        taken = 1 + relu
        if isinstance(layer, Conv):
            yield convolution(layer, relu=relu, first=place == 0, per_example=per_example)
        elif isinstance(layer, GroupNormalised) and scales is not None:
            relu, pool, more = _relu_and_pooling(behind)
            yield group_norm(layer, scales, relu=relu, pool=pool, per_example=per_example)
            taken = 2 + more
        elif isinstance(layer, Scale):
            yield scale(layer, relu=relu, per_example=per_example)
        elif isinstance(layer, Dense):
            yield _dense(layer, relu=relu, first=place == 0)
        else:
            yield _flat if layer is flattened else _any(steps[place])
            taken = 1
        place += taken


def _relu_and_pooling(steps: Sequence[Step]) -> tuple[bool, tuple[int, int], int]:
    """Returns whether a ReLU comes first, the pooling's block, and how many steps these are.

    They may come in either order: rectified maxima are the maxima of rectified values.
    """
    relu, pool, taken = False, (1, 1), 0
    for step in steps[:2]:
        block = pooling_block(step.apply)
        if is_relu(step.apply) and not relu:
            relu = True
        elif block is not None and pool == (1, 1) and block[0] * block[1] <= MAX_WINDOW:
            pool = block
        else:
            break
        taken += 1
    return relu, pool, taken


def _applied(step: Step, x: Tensor) -> Tensor:
    assert not isinstance(step.apply, Dense | Recurrent)
    args = [x if isinstance(one, StepResult) else one for one in step.args]
    return step.apply(*args, **step.kwargs)


def _any(step: Step) -> Link:
    """Returns a link whose backward pass comes from autograd."""

    def link(weights: Weights, x: Tensor) -> tuple[Tensor, Backward]:
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            result = _applied(step, leaf)

        def backward(grads: Tensor) -> tuple[Tensor, None]:
            (found,) = torch.autograd.grad([result], [leaf], [grads])
            return found, None

        return result.detach(), backward

    return link


def _flat(weights: Weights, x: Tensor) -> tuple[Tensor, Backward]:
    return flattened(x), lambda grads: (grads.view(x.shape), None)


def _dense(layer: Dense, *, relu: bool, first: bool) -> Link:
    """Returns a link for one row per example, ``(K, B, in)``, or several, ``(K, B, ..., in)``."""

    def link(weights: Weights, x: Tensor) -> tuple[Tensor, Backward]:
        weight, rows = weights[layer.weight], x.flatten(1, -2)
        if layer.bias is None:
            found = torch.bmm(rows, weight.transpose(1, 2))
        else:
            found = torch.baddbmm(weights[layer.bias].unsqueeze(1), rows, weight.transpose(1, 2))
        result = found.view(*x.shape[:-1], -1)
        if relu:
            result.relu_()

        def backward(grads: Tensor) -> tuple[Tensor, Share]:
            if relu:
                grads = torch.ops.aten.threshold_backward(grads, result, 0)
            share = _by_example(x), _by_example(grads), _by_example(grads)
            if first:
                return grads, share
            return torch.bmm(grads.flatten(1, -2), weight).view(x.shape), share

        return result, backward

    return link


def _by_example(rows: Tensor) -> Tensor:
    return rows.flatten(2, -2) if rows.dim() > 3 else rows
