"""Canaries: examples whose gradients point in directions of their own, and what a release tells.

The model has one weight for each canary, and the canary's gradient moves that weight alone, by the
clip norm. So the released weight is, up to known factors, the canary's presence plus the noise:
nobody who attacks a release can do better than to look at it (Nasr et al. 2023, arXiv:2302.07956,
section 4, Dirac canaries).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from fedcore.config.run import ClientConfig
from fedcore.errors import PrivacyError
from fedcore.privacy.planning import PrivatePlan, expected_batch_size
from fedcore.seeds import Randomness
from fedcore.task.definition import Examples, Kind, Loss, Task
from fedcore.task.model import FullModel
from fedcore.training.per_example.trial import find_way
from fedcore.training.per_example.ways import GradientMethod
from fedcore.training.private import train_private

Train = Callable[[Task, FullModel, Examples, ClientConfig], None]
"""Trains a task's model in place on examples: what is audited, its plan already bound."""

_SIZE = 16.0  # of a canary's gradient, in clip norms: what is clipped too late still shows
_SETTINGS = ClientConfig(learning_rate=1.0, device="cpu")


@dataclass(frozen=True)
class CanaryRelease:
    """One release, and what was in it."""

    included: NDArray[np.bool_]
    """Whether each canary was among the examples, shape ``(M,)``."""
    scores: NDArray[np.float64]
    """What the release shows of each canary, shape ``(M,)``, in clip norms: how often it was in a
    batch, plus the noise."""


def private_training(plan: PrivatePlan, randomness: Randomness) -> Train:
    """The function that devices train with, under ``plan``; each call draws numbers of its own.

    How a task's per-example gradients are taken is found out once for each task.
    """
    calls, ways = count(), dict[str, GradientMethod]()

    def train(task: Task, model: FullModel, examples: Examples, settings: ClientConfig) -> None:
        device = next(model.parameters()).device
        if task.name not in ways:
            ways[task.name] = find_way(task, model)
        train_private(
            model.preprocess,
            model.model,
            examples,
            task.loss_of,
            settings,
            plan,
            way=ways[task.name],
            draws=randomness.draws(device, "audit", next(calls)),
        )

    return train


def release(
    train: Train, stated: PrivatePlan, *, canaries: int, rng: np.random.Generator
) -> CanaryRelease:
    """Trains once on canaries, each included with probability 1/2, and scores all of them.

    A canary that is left out is an example of zeros: it has no gradient, and the number of
    examples stays (zero-out adjacency).

    Args:
        train: What is audited.
        stated: What it says that it does; read for its clip norm and sample rate alone.
        canaries: How many, M.
        rng: Draws which are included.

    Raises:
        PrivacyError: the release is not finite.
    """
    included = rng.random(canaries) < 0.5
    size = _SIZE * stated.clip_norm
    inputs = torch.diag(torch.from_numpy(included).to(torch.float32) * size)
    examples = cast(Examples, TensorDataset(inputs, torch.zeros(canaries)))
    task = canary_task(canaries)
    model = FullModel(nn.Identity(), task.model())
    train(task, model, examples, _SETTINGS)
    moved = cast(nn.Linear, model.model).weight.detach().double().flatten().numpy()
    if not np.isfinite(moved).all():
        raise PrivacyError(
            f"audit: a release on {canaries} canaries holds weights that are not finite, so it "
            "cannot be judged. The training function is at fault: every gradient of a canary is "
            f"finite, of norm {size:g}."
        )
    batch = expected_batch_size(canaries, stated)
    return CanaryRelease(included, moved * batch / (_SETTINGS.learning_rate * stated.clip_norm))


def canary_task(canaries: int) -> Task:
    """A linear model that starts at zero, and a loss whose gradient is the example, uphill."""

    def model() -> nn.Module:
        linear = nn.Linear(canaries, 1, bias=False)
        nn.init.zeros_(linear.weight)
        return linear

    return artificial_task(
        f"canaries-{canaries}",
        kind="regression",
        model=model,
        loss=lambda outputs, targets: -outputs.mean(),
        example_input=torch.zeros(canaries),
    )


def artificial_task(
    name: str, *, kind: Kind, model: Callable[[], nn.Module], loss: Loss, example_input: Tensor
) -> Task:
    """A task without data: what is trained on is handed to the training function."""

    def none(*_: object) -> Examples:
        raise AssertionError(f"task {name!r} has no data of its own")

    return Task(
        name=name,
        kind=kind,
        model=model,
        clients=lambda folder: (),
        client_data=none,
        test_data=none,
        loss=loss,
        example_input=example_input,
    )
