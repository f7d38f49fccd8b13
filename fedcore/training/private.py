"""Training with example-level differential privacy: DP-SGD by Opacus."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from opacus import GradSampleModule
from opacus.optimizers import DPOptimizer
from torch import Tensor, nn

from fedcore.config import Client
from fedcore.errors import UnsupportedLayer
from fedcore.privacy.accounting import Charge
from fedcore.privacy.planning import PrivatePlan, expected_batch_size
from fedcore.task import Examples, Loss, size_of
from fedcore.training.batches import gather
from fedcore.training.local import make_optimizer


def train_private(
    preprocess: nn.Module,
    model: nn.Module,
    examples: Examples,
    loss: Loss,
    settings: Client,
    plan: PrivatePlan,
    *,
    sampling: torch.Generator,
    noise: torch.Generator,
    proximal_mu: float = 0.0,
) -> None:
    """Trains ``model`` in place by DP-SGD.

    Guarantee:
        Each step is one subsampled Gaussian mechanism: Poisson sampling at ``plan.charge``'s rate,
        per-example gradients clipped to ``plan.clip_norm``, noise of its multiplier. An empty batch
        is a step too: it releases noise alone. Losses seen on the way are not released. Nothing
        but parameters changes.

    Args:
        preprocess: Runs before the model; treats each example alone and is not trained.
        model: On the device to train on; checked by `fedcore.privacy.layers.check_layers`.
        examples: The client's data.
        loss: Mean loss over a batch.
        settings: The optimiser's.
        plan: From `plan`.
        sampling: CPU generator that draws batches.
        noise: Generator on the model's device that draws noise.
        proximal_mu: Weight of FedProx's penalty. Its gradient does not depend on the data, so it
            is added behind the noise and costs no privacy.

    Raises:
        UnsupportedLayer: a layer keeps statistics of the data; ``model`` is then not to be used.

    Source:
        Abadi et al. 2016, arXiv:1607.00133, Algorithm 1.
    """
    device = next(model.parameters()).device
    model.train()
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    private = GradSampleModule(model)
    optimizer = DPOptimizer(
        make_optimizer(model, settings),
        noise_multiplier=plan.charge.noise_multiplier,
        max_grad_norm=plan.clip_norm,
        expected_batch_size=expected_batch_size(size_of(examples), plan),
        generator=noise,
    )
    if proximal_mu:
        optimizer.attach_step_hook(_pull(proximal_mu, optimizer.params))
    try:
        for inputs, targets in _poisson(examples, plan.charge, sampling):
            optimizer.zero_grad(set_to_none=True)
            if len(targets):
                value = loss(private(preprocess(inputs.to(device))), targets.to(device))
                _backward(value)
            else:  # some layers cannot run on an empty batch, so its gradients are given here
                for parameter in optimizer.params:
                    parameter.grad_sample = parameter.new_zeros((0, *parameter.shape))
            optimizer.step()
    finally:
        private.to_standard_module()
        for parameter in model.parameters():
            parameter.grad = None
    _check_buffers(model, buffers)


def _check_buffers(model: nn.Module, before: Mapping[str, Tensor]) -> None:
    """Refuses a model whose buffers moved: they travel with the weights, and without noise."""
    moved = [name for name, now in model.named_buffers() if not torch.equal(now, before[name])]
    if moved:
        raise UnsupportedLayer(
            f"model: training changed {', '.join(moved)}, which no parameter is. It may hold "
            "statistics of the data, and would leave the device without noise. Nothing was sent; "
            "use layers that keep none, or set privacy.unit to 'none'."
        )


def _poisson(
    examples: Examples, charge: Charge, rng: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches in which each example stands with the charge's probability, independently."""
    for _ in range(charge.steps):
        drawn = torch.rand(size_of(examples), generator=rng) < charge.sample_rate
        rows = drawn.nonzero().flatten()
        if len(rows):
            yield gather(examples, rows)
        else:
            inputs, targets = gather(examples, [0])
            yield inputs[:0], targets[:0]


def _pull(mu: float, parameters: Sequence[nn.Parameter]) -> Callable[[DPOptimizer], None]:
    """Adds the gradient of ``mu/2 * ||w - w_global||^2`` to what a step goes by."""
    anchor = [parameter.detach().clone() for parameter in parameters]

    def hook(optimizer: DPOptimizer) -> None:
        for parameter, start in zip(optimizer.params, anchor, strict=True):
            assert parameter.grad is not None  # the noise is in it
            parameter.grad.add_(parameter.detach() - start, alpha=mu)

    return hook


def _backward(value: Tensor) -> None:
    with warnings.catch_warnings():
        # Opacus hooks layers whose inputs need no gradient: torch says so at each, and it is meant.
        warnings.filterwarnings("ignore", message="Full backward hook is firing")
        torch.autograd.backward(value)
