"""Evaluates a model on a data set: its outputs, and metrics over all examples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from fedcore.errors import DataError
from fedcore.task.definition import Examples, size_of
from fedcore.task.measured import Measured, Measuring
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
    found: list[tuple[Tensor, Tensor]] = []
    _run(module, examples, between, lambda outputs, targets: found.append((outputs, targets)))
    outputs, targets = zip(*found, strict=True)
    return torch.cat(outputs), torch.cat(targets)


def measure(
    module: nn.Module,
    examples: Examples,
    metrics: Sequence[Metric],
    *,
    between: Callable[[], None] | None = None,
) -> Measured:
    """Computes each metric over all examples, and why one is undefined.

    ``between`` is called before each batch; an exception from it ends the work.

    Raises:
        DataError: There are no examples.
    """
    measuring = Measuring(metrics)
    _run(module, examples, between, measuring.add)
    return measuring.result()


def evaluate(
    module: nn.Module,
    examples: Examples,
    metrics: Sequence[Metric],
    *,
    between: Callable[[], None] | None = None,
) -> dict[str, float]:
    """Returns each metric over all examples, by name; NaN where one is undefined.

    ``between`` is called before each batch; an exception from it ends the work.

    Raises:
        DataError: There are no examples.
    """
    return measure(module, examples, metrics, between=between).scores(metrics)


def output_shape(module: nn.Module, example_input: Tensor) -> tuple[int, ...]:
    """Returns the shape of a model's outputs for one example, without the batch dimension."""
    was_training = module.training
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    with torch.inference_mode():
        found: Tensor = module.eval()(example_input[None].to(device))
    module.train(was_training)
    return tuple(found.shape[1:])


def _run(
    module: nn.Module,
    examples: Examples,
    between: Callable[[], None] | None,
    take: Callable[[Tensor, Tensor], None],
) -> None:
    """Passes outputs and targets to ``take``, batch by batch, both on the CPU."""
    if not size_of(examples):
        raise DataError(
            "evaluation: got no examples to evaluate the model on, expected at least 1. Nothing "
            "was evaluated; provide more data, or hold out a larger share of it."
        )
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    was_training = module.training
    module.eval()
    with for_images(module) as images, torch.inference_mode():
        views = ViewsOfAnyMemory() if images else nullcontext()
        for inputs, targets in in_order(examples, BATCH_SIZE):
            if between is not None:
                between()
            inputs = inputs.to(device)
            if images and inputs.dim() == 4:
                inputs = inputs.contiguous(memory_format=torch.channels_last)
            with views:
                found = module(inputs)
            take(found.cpu().contiguous(), targets)  # contiguous: metrics may call view()
    module.train(was_training)
