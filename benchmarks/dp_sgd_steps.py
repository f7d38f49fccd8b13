"""One optimiser step of each system that `benchmarks.dp_sgd` compares, on the same batch."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import torch
from opacus import PrivacyEngine
from opacus.layers import DPGRU
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.dp_sgd_models import Setting, Window
from fedcore.config.run import ClientConfig
from fedcore.privacy.accounting import Charge
from fedcore.privacy.draws import SystemDraws
from fedcore.privacy.planning import PrivatePlan
from fedcore.task.definition import Examples
from fedcore.task.model import FullModel
from fedcore.training.local import train
from fedcore.training.per_example.clipped_sum import clipped_sum, read_batch
from fedcore.training.per_example.gradient_methods import GradientMethod
from fedcore.training.per_example.trial import choose_method
from fedcore.training.private import MEMORY_BYTES, train_private

Steps = Callable[[int], None]
"""Takes so many steps."""
CLIP_NORM, NOISE = 1.0, 1.0
_CLIENT = ClientConfig(learning_rate=0.01)
_OPACUS_MODES = {"opacus-hooks": "hooks", "opacus-ghost": "ghost"}
SYSTEMS = ("plain", "fedcore", *_OPACUS_MODES)


def steps_of(system: str, setting: Setting, model: nn.Module) -> Steps:
    """The steps of a system, ready to be taken; they train a copy of ``model``."""
    model = copy.deepcopy(model)
    if system == "plain":
        return _plain(setting, model)
    if system == "fedcore":
        return _private(setting, model)
    return _opacus(setting, model, _OPACUS_MODES[system])


def way_of(setting: Setting, model: nn.Module) -> GradientMethod:
    """How fedcore takes the gradients of a model."""
    return choose_method(setting.task, FullModel(nn.Identity(), model))


def fedcore_sum(setting: Setting, model: nn.Module) -> Tensor:
    """The sum of clipped gradients, without noise, as one vector."""
    method, loss = way_of(setting, model), setting.task.loss
    assert loss is not None
    batches = read_batch(_examples(setting), torch.arange(len(setting.inputs)), _CPU, seed=0)
    found = clipped_sum(
        method,
        nn.Identity(),
        model,
        loss,
        batches,
        clip_norm=CLIP_NORM,
        physical=method.rows(MEMORY_BYTES),
    )
    return torch.cat([one.flatten() for one in found.sums])


def opacus_sum(setting: Setting, model: nn.Module) -> Tensor:
    """The same from Opacus, by hooks."""
    private, optimizer, _ = _made_private(setting, model, "hooks")
    assert setting.task.loss is not None
    setting.task.loss(private(setting.inputs), setting.targets).backward()
    optimizer.clip_and_accumulate()
    found = dict(private.named_parameters())
    names = [f"_module.{name}" for name, _ in model.named_parameters()]
    return torch.cat([found[name].summed_grad.flatten() for name in names])


_CPU = torch.device("cpu")


def _examples(setting: Setting) -> Examples:
    examples: Any = TensorDataset(setting.inputs, setting.targets)
    return examples


def _plain(setting: Setting, model: nn.Module) -> Steps:
    examples, rng, loss = _examples(setting), torch.Generator().manual_seed(0), setting.task.loss
    assert loss is not None

    def take(count: int) -> None:
        train(
            model,
            examples,
            loss,
            _CLIENT,
            epochs=count,
            batch_size=len(setting.inputs),
            rng=rng,
        )

    return take


def _private(setting: Setting, model: nn.Module) -> Steps:
    """Training as a device runs it; every example is in every batch, so that all are as large."""
    method, examples, loss = way_of(setting, model), _examples(setting), setting.task.loss
    assert loss is not None

    def take(count: int) -> None:
        plan = PrivatePlan(Charge(1, NOISE, 1.0, count), CLIP_NORM)
        train_private(
            nn.Identity(), model, examples, loss, _CLIENT, plan, method=method, draws=SystemDraws()
        )

    return take


def _made_private(setting: Setting, model: nn.Module, mode: str) -> Any:
    """Opacus's module, optimizer and, in ghost mode, criterion."""
    if isinstance(model, Window):  # Opacus has a GRU of its own, and refuses torch's
        theirs = Window(DPGRU)
        found = dict(theirs.named_parameters())
        with torch.no_grad():
            for name, one in model.named_parameters():
                found[name].copy_(one)
        model = theirs
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = PrivacyEngine().make_private(
            module=model.train(),
            optimizer=torch.optim.SGD(model.parameters(), lr=_CLIENT.learning_rate),
            data_loader=DataLoader(_examples(setting), batch_size=len(setting.inputs)),
            criterion=_Criterion(setting),
            noise_multiplier=NOISE,
            max_grad_norm=CLIP_NORM,
            poisson_sampling=False,
            grad_sample_mode=mode,
        )
    if mode == "ghost":
        private, optimizer, criterion, _ = made
        return private, optimizer, criterion
    (private, optimizer, _), criterion = made, _Criterion(setting)
    return private, optimizer, criterion


class _Criterion(nn.Module):
    """The task's loss in the form that Opacus's ghost clipping needs: with a reduction."""

    reduction = "mean"

    def __init__(self, setting: Setting) -> None:
        super().__init__()
        self.kind, self.loss = setting.kind, setting.task.loss

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The mean, or each example's own loss when ``reduction`` is "none"."""
        if self.kind == "regression":
            outputs = outputs.reshape(targets.shape)
            return nn.functional.mse_loss(outputs, targets, reduction=self.reduction)
        if self.kind == "next_token":
            outputs = outputs.transpose(1, 2)
        each = nn.functional.cross_entropy(outputs, targets, reduction="none")
        each = each.flatten(1).mean(dim=1) if each.dim() > 1 else each
        return each if self.reduction == "none" else each.mean()


def _opacus(setting: Setting, model: nn.Module, mode: str) -> Steps:
    private, optimizer, criterion = _made_private(setting, model, mode)

    def take(count: int) -> None:
        for _ in range(count):
            optimizer.zero_grad()
            criterion(private(setting.inputs), setting.targets).backward()
            optimizer.step()

    return take
