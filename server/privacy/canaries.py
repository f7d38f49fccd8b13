"""Canaries: synthetic examples with orthogonal gradients, whose presence a release reveals.

The model has one weight per canary. A canary's gradient changes only that weight, by the clip norm.
Up to known factors, the released weight is therefore the canary's presence plus noise, and no
attack on a release can do better than to read it (Nasr et al. 2023, arXiv:2302.07956, section 4,
Dirac canaries).
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
from fedcore.task.answers import new_model
from fedcore.task.definition import Examples, Loss, Task
from fedcore.task.kinds.registry import KindName
from fedcore.task.model import FullModel
from fedcore.training.per_example.gradient_methods import GradientMethod
from fedcore.training.per_example.trial import choose_method
from fedcore.training.private import train_private

Train = Callable[[Task, FullModel, Examples, ClientConfig], None]
"""The audited function: trains a task's model in place on examples; its plan is bound already."""

_SIZE = 16.0  # canary gradient norm in clip norms; exposes late clipping
_SETTINGS = ClientConfig(learning_rate=1.0, device="cpu")


@dataclass(frozen=True)
class CanaryRelease:
    """One release, and which canaries it was trained on."""

    included: NDArray[np.bool_]
    """Whether each canary was among the examples, shape ``(M,)``."""
    scores: NDArray[np.float64]
    """Score of each canary in the release, shape ``(M,)``, in clip norms: the number of batches
    that contained it, plus noise."""


def private_training(plan: PrivatePlan, randomness: Randomness) -> Train:
    """Returns the training function of devices, bound to ``plan``; each call draws fresh noise.

    The method of computing per-example gradients is determined once per task.
    """
    calls, ways = count(), dict[str, GradientMethod]()

    def train(task: Task, model: FullModel, examples: Examples, settings: ClientConfig) -> None:
        device = next(model.parameters()).device
        if task.name not in ways:
            ways[task.name] = choose_method(task, model)
        train_private(
            model.preprocess,
            model.model,
            examples,
            task.loss_of,
            settings,
            plan,
            method=ways[task.name],
            draws=randomness.draws(device, "audit", next(calls)),
        )

    return train


def release(
    train: Train, stated: PrivatePlan, *, canaries: int, rng: np.random.Generator
) -> CanaryRelease:
    """Trains once on canaries, each included with probability 1/2, and scores all of them.

    A canary that is left out is an example of zeros: its gradient is zero, and the number of
    examples is constant (zero-out adjacency).

    Args:
        train: The audited training function.
        stated: The stated plan; only clip norm and sample rate are used.
        canaries: Number of canaries, M.
        rng: Decides which canaries are included.

    Raises:
        PrivacyError: the released weights are not finite.
    """
    included = rng.random(canaries) < 0.5
    size = _SIZE * stated.clip_norm
    inputs = torch.diag(torch.from_numpy(included).to(torch.float32) * size)
    examples = cast(Examples, TensorDataset(inputs, torch.zeros(canaries)))
    task = canary_task(canaries)
    model = FullModel(nn.Identity(), new_model(task))
    train(task, model, examples, _SETTINGS)
    moved = cast(nn.Linear, model.model).weight.detach().double().flatten().numpy()
    if not np.isfinite(moved).all():
        raise PrivacyError(
            f"audit: a release on {canaries} canaries contains weights that are not finite, so "
            "it cannot be evaluated. The training function is at fault: every gradient of a "
            f"canary is finite, of norm {size:g}."
        )
    batch = expected_batch_size(canaries, stated)
    return CanaryRelease(included, moved * batch / (_SETTINGS.learning_rate * stated.clip_norm))


def canary_task(canaries: int) -> Task:
    """Builds a linear model that starts at zero; its loss has minus the example as gradient."""

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
    name: str, *, kind: KindName, model: Callable[[], nn.Module], loss: Loss, example_input: Tensor
) -> Task:
    """Builds a task without own data; the caller passes examples to the training function."""

    def none(*_: object) -> Examples:
        raise AssertionError(f"task {name!r} has no data")

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
