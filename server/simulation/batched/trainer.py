"""Choice of the batched trainer for a model, and its groups of clients that fit in memory.

`Trainers` finds and caches a `Trainer`; `train_in_groups` runs it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from fedcore.config.run import ClientConfig as Settings
from fedcore.errors import ConfigError, DataError, InsufficientMemory, InvalidUpdate, TaskError
from fedcore.task.definition import Loss
from fedcore.task.model import FullModel
from fedcore.training.batches import gather
from fedcore.training.client import Client
from fedcore.training.mods import client_mods
from fedcore.training.per_example.chain import Chain, torch_run
from fedcore.training.per_example.graph import find_chain
from fedcore.training.per_example.losses import is_cross_entropy, is_mean
from fedcore.training.per_example.runs import compiled_run
from fedcore.training.resident import Resident
from server.rounds.aggregation.exact_mean import AddScaled
from server.simulation.batched.chained import train_chained
from server.simulation.batched.stacked.supported import (
    mixes_examples,
    sizes_of,
    unsupported_parts,
)
from server.simulation.batched.stacked.train import train_stacked
from server.simulation.batched.stacked.trial import confuses_clients
from server.simulation.batched.work import LocalWork, TrainedClients

_LOOKED_AT = 32  # examples for testing the loss and the model
_GROUP_BYTES = 256 << 20  # 256 MiB: inputs and weights of the clients that train together
_STEP_BYTES = 4 << 20  # 4 MiB: about a core's own cache, for a step's largest layer
_IN_TURN = 8  # clients, where layers process them in turn: more save few calls but fill the cache


Train = Callable[[FullModel, Sequence[LocalWork], Settings, float], TrainedClients]
"""Trains clients from a model, with settings and FedProx's weight; returns results in order."""


@dataclass(frozen=True)
class Trainer:
    """Batched training of a task's clients, and the sizes for grouping them."""

    train: Train
    numbers: int
    """Largest number of values that a layer computes for one example; 0 where unknown."""
    sequential: bool = False
    """Whether layers process clients one after the other, not all at once."""
    add_scaled: AddScaled | None = None
    """Compiled function to add up the results; None to use NumPy."""


class Trainers:
    """Cache of a run's trainers, one per kind of settings."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._found: dict[tuple[str | bool, ...], Trainer] = {}

    def find(
        self,
        load: Callable[[], FullModel],
        work: Sequence[LocalWork],
        settings: Settings,
        *,
        chosen: bool,
    ) -> Trainer | None:
        """Returns the trainer for clients' settings, tested on the first client whose data works.

        None where no client's data works, or where these clients cannot be trained in batches,
        although others could.

        Args:
            load: Returns the resident model with the round's weights.
            work: Data and random streams of the clients.
            settings: Settings that all of them train with.
            chosen: Whether other clients were trained in batches before.

        Raises:
            ConfigError: batches do not work for this task, and ``chosen`` is false.
        """
        kind = _kind_of(settings)
        if kind in self._found:
            return self._found[kind]
        for sample in work:
            found = self._tried(load, sample, settings)
            if isinstance(found, Trainer):
                self._found[kind] = found
                return found
            if found is not None and not chosen:
                raise ConfigError(
                    f"simulation.training = 'vectorised': {found}. Nothing was trained; use 'loop' "
                    "or 'auto'."
                )
        return None

    def _tried(
        self, load: Callable[[], FullModel], sample: LocalWork, settings: Settings
    ) -> Trainer | str | None:
        """Returns a trainer, or why there is none; None where the client's data fails."""
        try:
            load()
            return find_trainer(self._client, self._client.resident, sample, settings)
        except (ConfigError, InsufficientMemory, InvalidUpdate, TaskError):
            raise
        except (Exception, SystemExit):  # reported when the client trains by itself
            return None


def _kind_of(settings: Settings) -> tuple[str | bool, ...]:
    """Returns the traits of clients' settings that a trainer depends on."""
    return (
        settings.optimizer,
        bool(settings.momentum),
        settings.max_grad_norm is not None,
        settings.steps is not None,
        _in_parts(settings),
    )


def _in_parts(settings: Settings) -> bool:
    """Whether clients compute their batches in parts."""
    return (settings.physical_batch_size or settings.batch_size) < settings.batch_size


def find_trainer(
    client: Client, resident: Resident, sample: LocalWork, settings: Settings
) -> Trainer | str:
    """Returns the batched trainer for a task's clients, or the reason why there is none.

    Args:
        client: The task and the run.
        resident: The task's model, on the device to train on.
        sample: A client's data, to test the task's loss and model.
        settings: The client's settings. Clients with other settings can use the trainer where
            `_kind_of` is equal.

    Raises:
        Exception: the task's code raised it for this client's data.
    """
    run, model = client.run, resident.model
    assert client.task.loss is not None  # set by `Task`
    loss: Loss = client.task.loss
    if client_mods(run.federation.strategy):
        return f"clients of {run.federation.strategy} each run their own mod around training"
    if _in_parts(settings):
        return (
            f"client.physical_batch_size = {settings.physical_batch_size} bounds memory, and "
            "clients that train together need more"
        )
    if run.client.local:
        return "layers that stay on clients (client.local) are trained one client at a time"
    forbidden = unsupported_parts(model)
    if forbidden:
        return (
            f"the model contains {forbidden}: with buffers, tied weights, hooks, "
            "random layers other than dropout, or layers that mix examples vectorised training "
            "would not give the result of a device"
        )
    # A single example is doubled: for a batch of one, a sum equals a mean.
    rows = range(min(_LOOKED_AT, sample.size)) if sample.size > 1 else (0, 0)
    inputs, targets = gather(sample.examples, rows)
    device = next(model.model.parameters()).device
    with torch.no_grad():
        behind = model.preprocess(inputs.to(device))
        outputs = model.model(behind)
    targets = targets.to(device)
    mean = is_mean(loss, outputs, targets)
    if mean is None:
        raise DataError("data: the loss of these examples is not finite. Others were tried.")
    whole = all(p.requires_grad for p in model.model.parameters()) and not _has_hooks(model.model)
    chain = find_chain(model.model, behind) if whole and mean else None
    if run.private and (chain is None or chain.drops):
        return (
            "under example-level privacy, dropout and models that are no chain of the supported "
            "layers are trained one client at a time"
        )
    if chain is not None:
        return _of_chain(chain, model, loss, settings, private=run.private)
    try:
        mixed = mixes_examples(model.model, behind)
        if mixed:
            return mixed
        sizes = sizes_of(model.model, behind)

        def train_any(
            model: FullModel, work: Sequence[LocalWork], settings: Settings, mu: float
        ) -> TrainedClients:
            return train_stacked(model, work, loss, settings, proximal_mu=mu, sizes=sizes.own)

        train_any(model, [sample, sample], settings, 0.0)
        wrong = confuses_clients(train_any, model, sample, settings)
    except Exception as error:  # the task's code, run in an unusual way
        said = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        return f"the model cannot run for many clients at once ({said})"
    return wrong or Trainer(train_any, sizes.largest)


def _of_chain(
    chain: Chain, model: FullModel, loss: Loss, settings: Settings, *, private: bool
) -> Trainer:
    """Returns the trainer of a chain, with compiled loops where available."""
    plain = not private and is_cross_entropy(loss)
    linear = _linear(chain, model, settings) if plain else None
    if linear is not None:
        return linear
    kernels = compiled_run(chain, model.model, per_example=private)
    way = torch_run(chain) if kernels is None else kernels

    def train(
        model: FullModel, work: Sequence[LocalWork], settings: Settings, mu: float
    ) -> TrainedClients:
        return train_chained(model, chain, work, loss, settings, proximal_mu=mu, run=way)

    if kernels is None:
        return Trainer(train, chain.numbers)
    return Trainer(train, chain.numbers, not private, _add_scaled())


def _linear(chain: Chain, model: FullModel, settings: Settings) -> Trainer | None:
    """Returns the compiled trainer of a linear classifier; None for other models."""
    from server.simulation.batched.linear import fits, train_linear  # compiles on first use

    if not fits(chain, model, settings):
        return None
    (layer,) = chain.layers

    def train(
        model: FullModel, work: Sequence[LocalWork], settings: Settings, mu: float
    ) -> TrainedClients:
        return train_linear(model, layer, work, settings, proximal_mu=mu)

    return Trainer(train, 0, add_scaled=_add_scaled())


def _add_scaled() -> AddScaled:
    """Returns the compiled sum; use it only where compiled loops are loaded anyway.

    Loading them takes time and memory.
    """
    from fedcore.kernels.fixed_point import add_scaled

    return add_scaled


def _has_hooks(model: nn.Module) -> bool:
    """Whether modules have forward hooks, which a chain would skip."""
    return any(one._forward_hooks or one._forward_pre_hooks for one in model.modules())


def train_in_groups(
    trainer: Trainer,
    model: FullModel,
    work: Sequence[LocalWork],
    client: Client,
    settings: Settings,
    mu: float,
) -> list[tuple[list[int], TrainedClients]]:
    """Trains clients in groups that fit in memory; returns each group's indices and results.

    Clients of similar size are grouped, to limit padding.
    """
    return [
        (places, trainer.train(model, [work[place] for place in places], settings, mu))
        for places in _groups(trainer, model, work, client, settings)
    ]


def _groups(
    trainer: Trainer,
    model: FullModel,
    work: Sequence[LocalWork],
    client: Client,
    settings: Settings,
) -> Iterator[list[int]]:
    parameters = sum(p.numel() for p in model.model.parameters()) * 4
    weights = 4 * parameters  # gradients, state, noise
    if client.run.private:
        weights += settings.batch_size * parameters  # per-example gradients
    step = settings.batch_size * trainer.numbers * 4
    most = len(work)
    if step and next(model.model.parameters()).device.type == "cpu":
        most = _IN_TURN if trainer.sequential else max(1, _STEP_BYTES // step)
        most = -(-len(work) // -(-len(work) // most))  # in groups of about equal size
    places = sorted(range(len(work)), key=lambda place: -work[place].size)
    numbers = client.task.example_input.numel()
    group: list[int] = []
    each = 0
    for place in places:
        if not group:  # the first is the largest of its group
            rows = math.ceil(work[place].size * settings.passes_of(work[place].size))
            # Factor 2: padding to a step's widest batch. Factor 8: outputs of all layers of a step.
            each = weights + 2 * rows * numbers * 4 + 8 * step
        group.append(place)
        if len(group) == most or (len(group) + 1) * each > _GROUP_BYTES:
            yield group
            group = []
    if group:
        yield group
