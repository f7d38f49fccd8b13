"""Training for 8 bits: the weights learn while layers compute with rounded numbers.

In: a model and the cloud's data. Out: a float32 model that loses less when `quantise` rounds it.
Start with `train_for_rounding`.
"""

from __future__ import annotations

import copy
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fedcore.errors import CompressionError
from server.compression.train_close import CloudTraining, Teacher, layers_of, train_close

Model = TypeVar("Model", bound=nn.Module)
_LEAST = 1e-12  # a layer of zeros has a scale, too
_MOMENTUM = 0.1  # of ranges of activations, over batches


def train_for_rounding(
    module: Model,
    example_batch: Tensor,
    training: CloudTraining,
    *,
    epochs: int,
    reduce_range: bool,
) -> Model:
    """Trains a copy of a model whose layers compute as `int8_static` will have them compute.

    Weights are rounded with one scale per output channel and inputs of layers with one scale for
    all, in the forward pass; gradients pass through the rounding (straight-through estimator). The
    last layers stay in float32, as they do in the file. By ``training.settings.remember`` the copy
    is held to the answers of the model.

    Args:
        module: The full model, on the CPU. Not changed.
        example_batch: Inputs ``(2, ...)``.
        training: Data, loss and settings.
        epochs: Passes over the data.
        reduce_range: Whether weights will have 7 bits.

    Raises:
        CompressionError: only the last layer has weights, or training fails.

    Source:
        Jacob et al. 2018, arXiv:1712.05877.
    """
    trained = copy.deepcopy(module)
    ran, last = layers_of(trained, example_batch)
    layers = [each for each in ran if each not in last]
    if not layers:
        raise CompressionError(
            "it has no linear or convolutional layers to train for 8 bits, other than the last one"
        )
    most = 63 if reduce_range else 127
    hooks = [each.register_forward_pre_hook(_RoundedInputs()) for each in layers]
    for each in layers:
        parametrize.register_parametrization(each, "weight", _RoundedWeights(most))
    teacher = Teacher(module, training.settings.remember)
    train_close(trained, teacher, training, epochs=epochs, purpose="rounding")
    for hook in hooks:
        hook.remove()
    for each in layers:
        parametrize.remove_parametrizations(each, "weight", leave_parametrized=False)
    return trained.eval()


class _RoundedWeights(nn.Module):
    """Weights ``(O, ...)`` as integers from ``-most`` to ``most``, with one scale per output."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self._most = most

    def forward(self, weight: Tensor) -> Tensor:
        largest = weight.detach().abs().flatten(1).amax(dim=1).clamp(min=_LEAST)
        zeros = torch.zeros(len(weight), dtype=torch.int32)
        most = self._most
        return torch.fake_quantize_per_channel_affine(weight, largest / most, zeros, 0, -most, most)


class _RoundedInputs:
    """A layer's inputs in 8 bits, over the moving range of those of the batches so far."""

    def __init__(self) -> None:
        self._range: tuple[float, float] | None = None

    def __call__(self, layer: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        inputs, *others = arguments
        if not inputs.is_floating_point() or not inputs.numel():
            return arguments
        now = min(0.0, float(inputs.detach().min())), max(0.0, float(inputs.detach().max()))
        before = self._range or now
        least, largest = (
            (1 - _MOMENTUM) * old + _MOMENTUM * new for old, new in zip(before, now, strict=True)
        )
        self._range = least, largest
        scale = max((largest - least) / 255, _LEAST)
        zero = round(-least / scale)
        return torch.fake_quantize_per_tensor_affine(inputs, scale, zero, 0, 255), *others
