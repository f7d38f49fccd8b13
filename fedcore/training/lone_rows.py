"""Batches of one example, which models with statistics over the batch cannot train on.

The last batch of an epoch has one example where the number of examples leaves a remainder of one.
`least_rows` finds out whether a model needs two; `use_running_statistics` lets a model train on
data of one example in all.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fedcore.errors import DataError
from fedcore.seeds import kept_streams
from fedcore.task.definition import Examples, size_of
from fedcore.training.batches import gather


def least_rows(
    module: nn.Module,
    loss: Callable[[Any, Tensor], Tensor],
    examples: Examples,
    *,
    count: int,
    batch_size: int,
    physical_batch_size: int | None = None,
) -> int:
    """Returns how many examples a step of training needs: 2 where one fails and two work, else 1.

    Tries it on a copy, and only where an epoch would have a batch, or a part of a batch, of one.

    Args:
        module: The model, on the device to train on.
        loss: Mean loss over a batch.
        examples: Data that contains the ``count`` examples; the first rows are tried.
        count: Examples of an epoch.
        batch_size: Examples per step.
        physical_batch_size: Most examples of a part of a batch; all of it when None.
    """
    part = min(batch_size, physical_batch_size or batch_size)
    batches = {min(batch_size, count), count % batch_size}
    if part == 1 or not any(batch % part == 1 for batch in batches):
        return 1
    rows = (0, 1) if size_of(examples) > 1 else (0, 0)
    works = [_works(module, loss, examples, rows[:number]) for number in (1, 2)]
    return 2 if works == [False, True] else 1


def _works(
    module: nn.Module,
    loss: Callable[[Any, Tensor], Tensor],
    examples: Examples,
    rows: tuple[int, ...],
) -> bool:
    device = next(module.parameters()).device
    try:
        with torch.no_grad(), kept_streams():
            inputs, targets = gather(examples, rows)
            copied = copy.deepcopy(module).train()
            return bool(torch.isfinite(loss(copied(inputs.to(device)), targets.to(device))))
    except Exception:  # the task's code; where two examples fail, too, training reports it
        return False


def use_running_statistics(module: nn.Module) -> None:
    """Has batch normalisation use its running statistics, not those of a batch.

    Lasts until ``module.train()`` is called.

    Raises:
        DataError: A layer has no running statistics.
    """
    for name, layer in module.named_modules():
        if isinstance(layer, _BatchNorm):
            if layer.running_mean is None:
                raise DataError(
                    f"data: it has one example, and {name} ({type(layer).__name__}), which "
                    "keeps no running statistics, needs two or more. No update was produced; "
                    "leave this data out, or let the layer track running statistics."
                )
            layer.eval()
