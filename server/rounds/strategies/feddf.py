"""FedDF: the clients' models teach the global one, by their answers on the cloud's inputs.

Start with `FedDF`; `distiller_of` gives what it trains with.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from fedcore.config.run import RunConfig
from fedcore.errors import ConfigError, RoundFailed
from fedcore.seeds import kept_streams, torch_rng
from fedcore.task.algorithm import Algorithm, ClientUpdate, Round, State, Weights
from fedcore.task.definition import Task, size_of
from fedcore.task.model import FullModel
from fedcore.training.batches import gather
from fedcore.training.evaluate import outputs_of
from fedcore.updates.pack import pack, unpack
from server.cloud import CloudData

FEDDF = "FedDF"
"""Value of ``federation.strategy``."""


@dataclass(frozen=True)
class Distillation:
    """How long the global model learns from its teachers in a round."""

    steps: int = 200
    batch_size: int = 64
    learning_rate: float = 1e-3
    """Of Adam; falls to zero by a cosine."""


Distil = Callable[[Weights, Sequence[Weights], Distillation, int], Weights]
"""Trains weights ``(D,)`` to answer as the mean of several models does; the last argument is a
seed, which determines every bit."""


@dataclass(frozen=True)
class FedDF(Algorithm):
    """Averages the clients' models, and then distils all of them into the average.

    Needs each client's update by itself, so it does not run under client-level privacy, and inputs
    in the cloud, whose targets it does not read. Under example-level privacy updates carry their
    noise already, and what follows costs nothing.

    Source:
        Lin et al. 2020, arXiv:2006.07242, Algorithm 1.
    """

    folds: ClassVar[bool] = False
    steps: int = 200
    batch_size: int = 64
    learning_rate: float = 1e-3
    distil: Distil | None = None
    """None where only the form of results counts, as before a run: the result is the average."""

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("batch_size", 1), ("learning_rate", 1e-9)):
            value, most = getattr(self, name), 1.0 if name == "learning_rate" else 1_000_000
            kinds = (int, float) if name == "learning_rate" else (int,)
            if type(value) not in kinds or not least <= value <= most:
                raise ConfigError(
                    f"federation.strategy_options.{name}: FedDF got {value!r}, expected a number "
                    f"from {least:g} to {most:g}. Nothing was run."
                )

    def aggregate(
        self, round: Round, weights: Weights, updates: Sequence[ClientUpdate], state: State
    ) -> tuple[Weights, State]:
        """Returns the distilled average of the updates."""
        total = sum(one.num_examples for one in updates)
        parts = np.stack([one.weights for one in updates])
        shares = np.array([one.num_examples / total for one in updates])
        mean: Weights = (shares @ parts).astype(np.float32)
        if self.distil is None:
            return mean, state
        how = Distillation(self.steps, self.batch_size, self.learning_rate)
        return self.distil(mean, [one.weights for one in updates], how, round.seed), state


def distiller_of(
    task: Task, run: RunConfig, model: FullModel, cloud: CloudData | None
) -> Distil | None:
    """Returns what `FedDF` distils with; None for runs of other strategies.

    Args:
        task: Its kind decides how far answers are from each other.
        run: ``federation.strategy`` is used.
        model: The model whose weights are given, with its preprocessing; overwritten.
        cloud: The cloud's data.
    """
    if run.federation.strategy != FEDDF or cloud is None:
        return None
    return partial(_distil, task, model, cloud)


def _distil(
    task: Task,
    model: FullModel,
    cloud: CloudData,
    start: Weights,
    teachers: Sequence[Weights],
    how: Distillation,
    seed: int,
) -> Weights:
    with kept_streams():
        torch.manual_seed(seed % 2**63)  # for dropout
        told = _mean_answers(model, teachers, cloud)
        unpack(start, model.model)
        _learn(task, model, cloud, told, how, torch_rng(seed, "distillation"))
    return pack(model.eval().model)


def _mean_answers(model: FullModel, teachers: Sequence[Weights], cloud: CloudData) -> Tensor:
    """Returns the mean of the teachers' outputs, ``(N, ...)``, for the cloud's inputs.

    A teacher whose outputs are not finite is left out.
    """
    total, count = torch.zeros(()), 0
    for teacher in teachers:
        unpack(teacher, model.model)
        outputs, _ = outputs_of(model, cloud.train)
        if bool(outputs.isfinite().all()):
            total, count = total + outputs, count + 1
    if not count:
        raise RoundFailed(
            "FedDF: no client's model gives finite outputs for the cloud's inputs. The global "
            "model is that of the round before; lower client.learning_rate."
        )
    return total / count


def _learn(
    task: Task,
    model: FullModel,
    cloud: CloudData,
    told: Tensor,
    how: Distillation,
    rng: torch.Generator,
) -> None:
    """Trains the model to give the answers ``told`` for the cloud's inputs."""
    trained = [one for one in model.parameters() if one.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=how.learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, how.steps)
    count, kind, loss = size_of(cloud.train), task.problem, task.loss_of
    device = trained[0].device
    model.train()
    order = torch.empty(0, dtype=torch.long)
    for _ in range(how.steps):
        if len(order) < min(how.batch_size, count):
            order = torch.randperm(count, generator=rng)
        rows, order = order[: how.batch_size], order[how.batch_size :]
        inputs, targets = gather(cloud.train, rows)
        optimizer.zero_grad(set_to_none=True)
        own = model(inputs.to(device))
        # Of the targets only their form is read.
        distance = kind.distance(own, told[rows].to(device), targets.to(device), loss)
        torch.autograd.backward(distance)
        optimizer.step()
        schedule.step()
