"""DP-SGD: training with example-level differential privacy."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fedcore.config.run import ClientConfig
from fedcore.privacy.draws import FLOAT_MARGIN, Draws
from fedcore.privacy.planning import PrivatePlan, expected_batch_size
from fedcore.task.definition import Examples, Loss, size_of
from fedcore.training.local import make_optimizer
from fedcore.training.per_example.clipped_sum import clipped_sum, read_batch
from fedcore.training.per_example.gradient_methods import GradientMethod, trainable_parameters

MEMORY_BYTES = 512 << 20
"""Memory for the gradients of one physical batch."""
_LARGEST_WEIGHT = 1e30


def train_private(
    preprocess: nn.Module,
    model: nn.Module,
    examples: Examples,
    loss: Loss,
    settings: ClientConfig,
    plan: PrivatePlan,
    *,
    method: GradientMethod,
    draws: Draws,
    proximal_mu: float = 0.0,
    memory_bytes: int = MEMORY_BYTES,
    between: Callable[[], None] | None = None,
) -> int:
    """Trains ``model`` in place by DP-SGD.

    Guarantee:
        Each step is one subsampled Gaussian mechanism on a sum of sensitivity ``plan.clip_norm``
        (see `clipped_sum`): Poisson sampling at the rate of ``plan.charge``, and noise of its
        multiplier. An empty batch is a step, too: it releases pure noise. Whatever the examples
        are, the number of steps is the same, no exception depends on them, and the final weights
        are finite. Only the trained parameters change.

    Args:
        preprocess: Runs before the model, on each example separately; not trained.
        model: The model, on the device to train on.
        examples: The client's data; their number is public.
        loss: Mean loss over a batch; called on batches of one.
        settings: Optimiser settings.
        plan: From `fedcore.privacy.planning.plan`.
        method: From `fedcore.training.per_example.trial.choose_method`, for this model and loss.
        draws: Source of batches and noise.
        proximal_mu: Weight of FedProx's penalty. Its gradient does not depend on the data, so it is
            added after the noise and costs no privacy.
        memory_bytes: Memory for the gradients of one physical batch.
        between: Callback before each step; an exception from it ends the work. It may depend on
            elapsed time, but on nothing else that the examples influence.

    Returns:
        Number of batch positions that counted as zero because the example had no finite gradient or
        could not be read. Private.

    Source:
        Abadi et al. 2016, arXiv:1607.00133, Algorithm 1.
    """
    model.train()
    parameters = list(trainable_parameters(model).values())
    device, count = parameters[0].device, size_of(examples)
    start = [parameter.detach().clone() for parameter in parameters]
    optimizer = make_optimizer(model, settings)
    batch_size = expected_batch_size(count, plan)
    physical = method.rows(memory_bytes)
    if settings.physical_batch_size is not None:
        physical = min(physical, settings.physical_batch_size)
    seed, skipped = draws.seed(), 0
    with kept_bounded(model):
        for step in range(plan.charge.steps):
            if between is not None:
                between()
            rows = draws.poisson(count, plan.charge.sample_rate)
            batches = read_batch(
                examples, rows, device, seed=seed + step * count, usual=method.usual
            )
            found = clipped_sum(
                method,
                preprocess,
                model,
                loss,
                batches,
                clip_norm=plan.clip_norm,
                physical=physical,
            )
            skipped += found.skipped
            draws.add_noise(
                found.sums, deviation=noise_deviation(plan), bound=count * plan.clip_norm
            )
            for parameter, noisy, first in zip(parameters, found.sums, start, strict=True):
                parameter.grad = (noisy / batch_size).to(parameter.dtype)
                if proximal_mu:
                    parameter.grad.add_(parameter.detach() - first, alpha=proximal_mu)
            optimizer.step()
    return skipped


@contextmanager
def kept_bounded(model: nn.Module) -> Iterator[None]:
    """Keeps what DP-SGD leaves in a model within its guarantee, at the end of the block.

    Weights that are not finite or far too large take their first values again, judged by the noised
    weights alone. Buffers and frozen parameters, which no noise covers, are restored, and gradients
    are dropped.
    """
    parameters = list(trainable_parameters(model).values())
    start = [parameter.detach().clone() for parameter in parameters]
    untrained = _untrained(model)
    try:
        yield
    finally:
        for parameter, first in zip(parameters, start, strict=True):
            parameter.grad = None
            _make_finite(parameter, first)
        for module, name, tensor, before in untrained:  # else released without noise
            tensor.copy_(before)
            setattr(module, name, tensor)  # the model may have assigned another tensor


def noise_deviation(plan: PrivatePlan) -> float:
    """Returns the standard deviation of the noise added to a sum of clipped gradients."""
    return plan.charge.noise_multiplier * plan.clip_norm * (1 + FLOAT_MARGIN)


def _untrained(model: nn.Module) -> list[tuple[nn.Module, str, Tensor, Tensor]]:
    """Returns buffers and frozen parameters, each with its module, its name and a copy."""
    return [
        (module, name, tensor, tensor.detach().clone())
        for module in model.modules()
        for named in (module.named_buffers(recurse=False), module.named_parameters(recurse=False))
        for name, tensor in named
        if not tensor.requires_grad
    ]


def _make_finite(parameter: nn.Parameter, start: Tensor) -> None:
    """Resets diverged weights to their initial values, by looking only at the noised weights."""
    with torch.no_grad():
        runaway = ~(parameter.abs() <= _LARGEST_WEIGHT)
        parameter.copy_(torch.where(runaway, start, parameter))
