"""Chooses how the clients of a model can be trained together, and keeps the group within memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedcore.config.run import ClientConfig as Settings
from fedcore.errors import ConfigError, DataError, InsufficientMemory, InvalidUpdate, TaskError
from fedcore.task.definition import Loss
from fedcore.task.model import FullModel
from fedcore.training.batches import gather
from fedcore.training.client import Client
from fedcore.training.mods import client_mods
from fedcore.training.per_example.chain import Chain, by_torch
from fedcore.training.per_example.graph import find_chain
from fedcore.training.per_example.losses import is_cross_entropy, is_mean
from fedcore.training.per_example.runs import compiled_run
from fedcore.training.resident import Resident
from server.rounds.aggregation.exact_mean import AddScaled
from server.simulation.batched.chained import train_chained
from server.simulation.batched.vmap import train_cohort, what_forbids
from server.simulation.batched.work import LocalWork, TrainedClients

_LOOKED_AT = 32  # examples that the loss and the model are tried on
_GROUP_BYTES = 256 << 20  # 256 MiB: inputs and weights of the clients that train together
_STEP_BYTES = 4 << 20  # 4 MiB: what a core's own cache about holds of a step's largest layer
_IN_TURN = 8  # clients, where layers take them in turn: more save few calls, and crowd the cache


Train = Callable[[FullModel, Sequence[LocalWork], Settings, float], TrainedClients]
"""Trains clients from one model, with a round's settings and FedProx's weight, in their order."""


@dataclass(frozen=True)
class Trainer:
    """What trains the clients of a task side by side."""

    train: Train
    numbers: int
    """The most that a layer makes of one example; 0 where it is not known."""
    in_turn: bool = False
    """Whether it is made of one client after the other, not of all at once."""
    add_scaled: AddScaled | None = None
    """What adds up its results the quickest, if that is compiled as well."""


class Trainers:
    """What trains a run's clients side by side, found once for each kind of settings."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._found: dict[tuple[str, bool], Trainer] = {}

    def find(
        self,
        load: Callable[[], FullModel],
        work: Sequence[LocalWork],
        settings: Settings,
        *,
        chosen: bool,
    ) -> Trainer | None:
        """Found with the first client whose data the task takes.

        None where it takes none of theirs, or none can be trained so though others could.

        Args:
            load: Puts the round's weights into the resident model.
            work: What clients bring.
            settings: What all of them train with.
            chosen: Whether others were trained side by side before.

        Raises:
            ConfigError: none can be trained so, and no other was before.
        """
        kind = (settings.optimizer, bool(settings.momentum))  # what one trainer is for
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
        """What trains clients like this one, or why nothing can; None where its data fail."""
        try:
            load()
            return find_trainer(self._client, self._client.resident, sample, settings)
        except (ConfigError, InsufficientMemory, InvalidUpdate, TaskError):
            raise
        except (Exception, SystemExit):  # trained alone, this client says what is wrong
            return None


def find_trainer(
    client: Client, resident: Resident, sample: LocalWork, settings: Settings
) -> Trainer | str:
    """What trains this task's clients side by side, or why nothing can.

    Args:
        client: The task and the run.
        resident: The task's model, on the device to train on.
        sample: What some client brings; the task's loss and model are tried on it.
        settings: What it trains with. Others may differ in all but the optimiser, and in whether it
            has momentum.

    Raises:
        Exception: whatever the task's code raises on this client's data; another's may do.
    """
    run, model = client.run, resident.model
    assert client.task.loss is not None  # a Task sets it
    loss: Loss = client.task.loss
    if client_mods(run.federation.strategy):
        return f"clients of {run.federation.strategy} run a mod around their training, each its own"
    forbidden = what_forbids(model)
    if forbidden:
        return (
            f"the model holds {forbidden}: with buffers, frozen or tied weights, random layers or "
            "layers that mix examples it cannot be trained side by side with the result that a "
            "device would get"
        )
    # Twice, where there is only one: of a batch of one a sum is a mean, too.
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
    if not mean:
        return "the task's loss is no mean over the examples of a batch"
    chain = None if _has_hooks(model.model) else find_chain(model.model, behind)
    if chain is not None:
        return _of_chain(chain, model, loss, settings, private=run.private)
    if run.private:
        return (
            "per-example gradients of more than dense layers and convolutions are taken one client "
            "at a time"
        )
    mixed = _what_mixes(model.model, behind, targets, loss)
    if mixed:
        return mixed

    def train_any(
        model: FullModel, work: Sequence[LocalWork], settings: Settings, mu: float
    ) -> TrainedClients:
        return train_cohort(model, work, loss, settings, proximal_mu=mu)

    try:
        train_any(model, [sample, sample], settings, 0.0)
    except Exception as error:  # the task's code, in a way in which no batch runs it
        said = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        return f"torch cannot run it for many clients at once ({said})"
    return Trainer(train_any, 0)


def _of_chain(
    chain: Chain, model: FullModel, loss: Loss, settings: Settings, *, private: bool
) -> Trainer:
    """What trains a chain of products, by compiled loops where they are there."""
    plain = not private and is_cross_entropy(loss)
    linear = _linear(chain, model, settings) if plain else None
    if linear is not None:
        return linear
    kernels = compiled_run(chain, model.model, apart=private)
    way = by_torch(chain) if kernels is None else kernels

    def train(
        model: FullModel, work: Sequence[LocalWork], settings: Settings, mu: float
    ) -> TrainedClients:
        return train_chained(model, chain, work, loss, settings, proximal_mu=mu, run=way)

    if kernels is None:
        return Trainer(train, chain.numbers)
    return Trainer(train, chain.numbers, not private, _add_scaled())


def _linear(chain: Chain, model: FullModel, settings: Settings) -> Trainer | None:
    """What trains a linear classifier the quickest, if that is what the model is."""
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
    """Only where compiled loops are loaded in any case: they take their time and memory."""
    from fedcore.kernels.fixed_point import add_scaled

    return add_scaled


def _has_hooks(model: nn.Module) -> bool:
    """Whether layers call anything when they run, which a chain of products would not."""
    return any(one._forward_hooks or one._forward_pre_hooks for one in model.modules())


def _what_mixes(model: nn.Module, inputs: Tensor, targets: Tensor, loss: Loss) -> str:
    """Why examples side by side would not be what they are alone, tried on some; empty if not."""
    was_training = model.training
    model.train()
    try:
        with torch.no_grad():
            together = model(inputs)
            try:
                alone = torch.cat([model(one.unsqueeze(0)) for one in inputs])
            except Exception as error:  # the task's code, which takes the batch
                return f"the model takes no batch of one example ({type(error).__name__}: {error})"
        with torch.enable_grad():
            value = loss(model(inputs), targets)
            parameters = dict(model.named_parameters())
            slopes = torch.autograd.grad(value, list(parameters.values()), allow_unused=True)
    finally:
        model.train(was_training)
    scale = float(together.abs().max()) if together.is_floating_point() else 1.0
    if not torch.allclose(together, alone, rtol=1e-3, atol=1e-4 * scale):
        return "the model mixes the examples of a batch, or draws random numbers"
    unused = [name for name, one in zip(parameters, slopes, strict=True) if one is None]
    return f"nothing depends on {', '.join(unused)}" if unused else ""


def train_in_groups(
    trainer: Trainer,
    model: FullModel,
    work: Sequence[LocalWork],
    client: Client,
    settings: Settings,
    mu: float,
) -> list[tuple[list[int], TrainedClients]]:
    """Trains as many clients at once as memory is set aside for: each group's places, and results.

    Clients of like size go together, so that little is padded.
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
        weights += settings.batch_size * parameters  # examples' own gradients
    step = settings.batch_size * trainer.numbers * 4
    most = len(work)
    if step and next(model.model.parameters()).device.type == "cpu":
        most = _IN_TURN if trainer.in_turn else max(1, _STEP_BYTES // step)
        most = -(-len(work) // -(-len(work) // most))  # in groups of about one size
    places = sorted(range(len(work)), key=lambda place: -work[place].size)
    numbers = client.task.example_input.numel()
    group: list[int] = []
    each = 0
    for place in places:
        if not group:  # the largest of its group
            rows = work[place].size * settings.epochs
            # Twice: a step's widest batch pads all. Eight: all that a step's layers make.
            each = weights + 2 * rows * numbers * 4 + 8 * step
        group.append(place)
        if len(group) == most or (len(group) + 1) * each > _GROUP_BYTES:
            yield group
            group = []
    if group:
        yield group
