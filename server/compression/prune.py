"""Structured pruning: removes whole channels, which makes a model smaller and faster anywhere."""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
import torch_pruning
from torch import Tensor, nn

from fedcore.errors import CompressionError
from server.compression.export import quiet
from server.compression.train_close import (
    LAYERS,
    CloudTraining,
    Teacher,
    layers_of,
    short,
    train_close,
)

Model = TypeVar("Model", bound=nn.Module)


def prune_channels(module: Model, example_batch: Tensor, *, fraction: float) -> Model:
    """Removes the least important channels of every hidden layer.

    A channel's importance is the L2 norm of all its weights: those that compute it, and those of
    later layers that read it. Inputs, and outputs of the last layers, keep their size.

    Args:
        module: The full model, on the CPU. Not changed.
        example_batch: Inputs ``(2, ...)`` on which the model is traced.
        fraction: Share of each hidden layer's channels to remove, between 0 and 1.

    Returns:
        A smaller copy with the weights of the remaining channels, not yet retrained.

    Raises:
        CompressionError: the model has no removable channels, or an architecture that can't be
            pruned (recurrent layers, attention).

    Source:
        Fang et al. 2023, arXiv:2301.12900 (dependency graph and group importance).
    """
    pruned = copy.deepcopy(module).eval()
    frozen = {name for name, one in pruned.named_parameters() if not one.requires_grad}
    for each in pruned.parameters():  # the library follows gradients
        each.requires_grad_(each.is_floating_point())
    before = _size(pruned)
    with torch.no_grad():
        expected = pruned(example_batch).shape
    try:
        with quiet():
            torch_pruning.pruner.BasePruner(
                pruned,
                example_batch,
                importance=torch_pruning.importance.GroupMagnitudeImportance(p=2),
                pruning_ratio=fraction,
                ignored_layers=_last_layers(pruned, example_batch),
                root_module_types=list(LAYERS),
                # The library's default dictionaries would be shared by all its pruners.
                in_channel_groups={},
                out_channel_groups={},
                num_heads={},
            ).step()
            with torch.no_grad():
                shape = pruned(example_batch).shape
    except CompressionError:
        raise
    except Exception as error:  # the library raises many types on unknown models
        raise CompressionError(
            f"it cannot be pruned: {type(error).__name__}: {short(error)}"
        ) from error
    if shape != expected:
        raise CompressionError(
            f"it cannot be pruned: outputs would change from {tuple(expected)} to {tuple(shape)}"
        )
    if _size(pruned) == before:
        raise CompressionError("it has no hidden channels that can be removed")
    for name, one in pruned.named_parameters():
        one.requires_grad_(name not in frozen and one.is_floating_point())
    return pruned


def prune_and_recover(
    module: Model,
    example_batch: Tensor,
    training: CloudTraining,
    *,
    fraction: float,
    epochs: int,
) -> Model:
    """Prunes a model and retrains the rest on the cloud's data.

    By ``training.settings.remember`` the rest is held to the answers of the model before pruning.

    Args:
        module: The full model, on the CPU. Not changed.
        example_batch: Inputs ``(2, ...)``.
        training: Data, loss and settings.
        fraction: Share of each hidden layer's channels to remove.
        epochs: Passes over the data; 0 for no retraining.

    Raises:
        CompressionError: the model can't be pruned, or retraining fails.
    """
    pruned = prune_channels(module, example_batch, fraction=fraction)
    teacher = Teacher(module, training.settings.remember)
    train_close(pruned, teacher, training, epochs=epochs, purpose="prune")
    return pruned.eval()


def _last_layers(module: nn.Module, example_batch: Tensor) -> list[nn.Module]:
    """Returns the prunable layers whose outputs are the model's."""
    ran, last = layers_of(module, example_batch)
    if not ran:
        raise CompressionError("it has no linear or convolutional layers to prune")
    return [each for each in ran if each in last]


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
