"""Training with example-level differential privacy: DP-SGD."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fedcore.config.run import ClientConfig
from fedcore.privacy.draws import FLOAT_MARGIN, Draws
from fedcore.privacy.planning import PrivatePlan, expected_batch_size
from fedcore.task.definition import Examples, Loss, size_of
from fedcore.training.local import make_optimizer
from fedcore.training.per_example.clipped_sum import clipped_sum, read_batch
from fedcore.training.per_example.ways import GradientMethod, trained

MEMORY_BYTES = 512 << 20
"""What the gradients of one physical batch may take."""
_LARGEST_WEIGHT = 1e30


def train_private(
    preprocess: nn.Module,
    model: nn.Module,
    examples: Examples,
    loss: Loss,
    settings: ClientConfig,
    plan: PrivatePlan,
    *,
    way: GradientMethod,
    draws: Draws,
    proximal_mu: float = 0.0,
    memory_bytes: int = MEMORY_BYTES,
    between: Callable[[], None] | None = None,
) -> int:
    """Trains ``model`` in place by DP-SGD.

    Guarantee:
        Each step is one subsampled Gaussian mechanism on a sum of sensitivity ``plan.clip_norm``
        (see `clipped_sum`): Poisson sampling at ``plan.charge``'s rate, noise of its multiplier. An
        empty batch is a step too: it releases noise alone. Whatever the examples are, the same
        number of steps is taken, nothing is raised that depends on them, and the weights are
        finite afterwards. Nothing but the trained parameters changes.

    Args:
        preprocess: Runs before the model, on each example alone, and is not trained.
        model: On the device to train on.
        examples: The client's data; their number is public.
        loss: Mean loss over a batch; it is called on batches of one.
        settings: The optimiser's.
        plan: From `fedcore.privacy.planning.plan`.
        way: From `fedcore.training.per_example.trial.find_way`, for this model and loss.
        draws: Batches and noise.
        proximal_mu: Weight of FedProx's penalty. Its gradient does not depend on the data, so it
            is added behind the noise and costs no privacy.
        memory_bytes: What the gradients of one physical batch may take.
        between: Called before each step; what it raises ends the work. It must look at nothing that
            the examples decide but the time that has passed.

    Returns:
        How many places in batches counted as zero, as the example there had no finite gradient or
        could not be read. It is private.

    Source:
        Abadi et al. 2016, arXiv:1607.00133, Algorithm 1.
    """
    model.train()
    parameters = list(trained(model).values())
    device, count = parameters[0].device, size_of(examples)
    start = [parameter.detach().clone() for parameter in parameters]
    untrained = _untrained(model)
    optimizer = make_optimizer(model, settings)
    batch_size = expected_batch_size(count, plan)
    seed, skipped = draws.seed(), 0
    try:
        for step in range(plan.charge.steps):
            if between is not None:
                between()
            rows = draws.poisson(count, plan.charge.sample_rate)
            batches = read_batch(examples, rows, device, seed=seed + step * count, usual=way.usual)
            found = clipped_sum(
                way,
                preprocess,
                model,
                loss,
                batches,
                clip_norm=plan.clip_norm,
                physical=way.rows(memory_bytes),
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
    finally:
        for parameter, first in zip(parameters, start, strict=True):
            parameter.grad = None
            _make_finite(parameter, first)
        for module, name, tensor, before in untrained:  # they would leave without noise
            tensor.copy_(before)
            setattr(module, name, tensor)  # the model may have put another one in its place
    return skipped


def noise_deviation(plan: PrivatePlan) -> float:
    """The standard deviation of the noise that is added to a sum of clipped gradients."""
    return plan.charge.noise_multiplier * plan.clip_norm * (1 + FLOAT_MARGIN)


def _untrained(model: nn.Module) -> list[tuple[nn.Module, str, Tensor, Tensor]]:
    """Buffers and frozen parameters: whose they are, their names, themselves and their copies."""
    return [
        (module, name, tensor, tensor.detach().clone())
        for module in model.modules()
        for named in (module.named_buffers(recurse=False), module.named_parameters(recurse=False))
        for name, tensor in named
        if not tensor.requires_grad
    ]


def _make_finite(parameter: nn.Parameter, start: Tensor) -> None:
    """Puts the start's value where a weight has run away: decided by the noised weights alone."""
    with torch.no_grad():
        runaway = ~(parameter.abs() <= _LARGEST_WEIGHT)
        parameter.copy_(torch.where(runaway, start, parameter))
