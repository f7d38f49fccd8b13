"""How tests find the way in which a model's per-example gradients are taken."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from fedcore.task.definition import Loss, Task
from fedcore.task.kinds.registry import KindName
from fedcore.task.model import FullModel
from fedcore.training.per_example.gradient_methods import GradientMethod, GradientPart, zero_totals
from fedcore.training.per_example.trial import choose_method


def task_of(
    model: nn.Module, loss: Loss, example: Tensor, kind: KindName = "classification"
) -> Task:
    """A task of a model and a loss, without data."""

    def none(*_: str | Path | None) -> list[str]:
        raise AssertionError("a way is found without a look at data")

    return Task(
        name="test",
        kind=kind,
        model=lambda: model,
        clients=none,
        client_data=none,  # type: ignore[arg-type]
        test_data=none,  # type: ignore[arg-type]
        example_input=example,
        loss=loss,
    )


def way_of(
    model: nn.Module,
    loss: Loss,
    example: Tensor,
    kind: KindName = "classification",
    *,
    preprocess: nn.Module | None = None,
) -> GradientMethod:
    """What `choose_method` finds for a model, on whatever device it is; the model is not changed.

    Args:
        model: Takes batches ``(B, *example.shape)`` behind preprocessing.
        loss: Mean loss over a batch.
        example: One input.
        kind: Of the task: which targets are tried first.
        preprocess: Runs before the model; nothing when None.
    """
    task = task_of(model, loss, example, kind)
    return choose_method(task, FullModel(preprocess or nn.Identity(), model))


def weighted(part: GradientPart, model: nn.Module, share: Tensor) -> list[Tensor]:
    """The sum of a part's gradients, each times its share: a tensor for each trained parameter."""
    totals = zero_totals(model)
    part.add(share, totals)
    return [one.float() for one in totals]
