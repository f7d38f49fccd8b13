"""Evaluates a model on a data set: its outputs, and metrics over all examples."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from fedcore.errors import DataError
from fedcore.task.definition import Examples, size_of
from fedcore.task.metrics import Metric
from fedcore.training.batches import in_order
from fedcore.training.order import ViewsOfAnyMemory, for_images

BATCH_SIZE = 512


def outputs_of(
    module: nn.Module, examples: Examples, *, between: Callable[[], None] | None = None
) -> tuple[Tensor, Tensor]:
    """Returns the model's outputs ``(N, ...)`` and the targets ``(N, ...)``, both on the CPU.

    Runs in evaluation mode. ``between`` is called before each batch; an exception from it ends the
    work.

    Raises:
        DataError: There are no examples.
    """
    if not size_of(examples):
        raise DataError(
            "evaluation: got no examples to evaluate the model on, expected at least 1. Nothing "
            "was evaluated; provide more data, or hold out a larger share of it."
        )
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    was_training = module.training
    module.eval()
    outputs, targets = [], []
    with for_images(module) as images, torch.inference_mode():
        views = ViewsOfAnyMemory() if images else nullcontext()
        for inputs, target in in_order(examples, BATCH_SIZE):
            if between is not None:
                between()
            inputs = inputs.to(device)
            if images and inputs.dim() == 4:
                inputs = inputs.contiguous(memory_format=torch.channels_last)
            with views:
                found = module(inputs)
            outputs.append(found.cpu().contiguous())  # so that metrics may call view()
            targets.append(target)
    module.train(was_training)
    return torch.cat(outputs), torch.cat(targets)


def evaluate(
    module: nn.Module,
    examples: Examples,
    metrics: Iterable[Metric],
    *,
    between: Callable[[], None] | None = None,
) -> dict[str, float]:
    """Returns each metric over all examples, by name.

    ``between`` is called before each batch; an exception from it ends the work.

    Raises:
        DataError: There are no examples.
    """
    outputs, targets = outputs_of(module, examples, between=between)
    return {metric.name: metric.compute(outputs, targets) for metric in metrics}
