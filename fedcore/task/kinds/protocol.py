"""The protocol of a kind of problem, which says what outputs and targets mean.

Everything in fedcore that depends on the kind asks the kind, so a new one is one class.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedcore.artifacts.parity import agreement
from fedcore.artifacts.presentation import Presentation
from fedcore.task.metrics import Metric

Loss = Callable[[Tensor, Tensor], Tensor]
"""Maps outputs ``(B, ...)`` and targets ``(B, ...)`` to the mean loss over the batch, a scalar."""


@dataclass(frozen=True)
class TargetOptions:
    """A task's settings for its targets."""

    class_weights: tuple[float, ...] = ()
    """Weight of each class in the loss; empty for equal weights."""
    ignore_index: int | None = None
    """Value of targets that count in neither loss nor metrics; None if all count."""
    label_smoothing: float = 0.0
    """Share of each target's probability that is spread evenly, from 0 to below 1."""

    def __bool__(self) -> bool:
        """Returns whether any setting differs from its default."""
        return self != TargetOptions()


@dataclass(frozen=True)
class OutputForm:
    """Shape and dtype of a model's outputs for one input."""

    shape: torch.Size
    """Without the batch dimension."""
    dtype: torch.dtype


class TargetFault(Exception):
    """Targets that a kind cannot use. `fedcore.training.examples` turns it into a `DataError`."""

    def __init__(self, rows: Sequence[int], got: str, expected: str, remedy: str) -> None:
        super().__init__(got)
        self.rows = rows
        """Places in the batch, at least one."""
        self.got = got
        self.expected = expected
        self.remedy = remedy
        """The next step, as an imperative."""


class Kind:
    """A kind of problem. Subclass it, override what differs, and pass an object as ``kind``.

    A subclass gives ``name``, and a task of such a kind states its own ``loss`` and ``metrics``
    unless the kind does.

    Example::

        class Ranking(fedcore.Kind):
            name = "ranking"

            def loss(self, options):  # outputs (B, items), targets (B, 2): preferred, other
                def pairwise(outputs, targets):
                    preferred, other = outputs.gather(1, targets).unbind(1)
                    return -torch.nn.functional.logsigmoid(preferred - other).mean()

                return pairwise

        task = fedcore.Task(kind=Ranking(), metrics=(hit_rate,), ...)
    """

    name: str = ""
    """Lower-case letters, digits and ``_``; released models carry it."""
    presentation: Presentation = "values"
    """How devices tell an answer, and what it means for two models to agree."""
    options: frozenset[str] = frozenset()
    """Names of the settings of `TargetOptions` that ``loss`` uses; others are refused."""
    logits: bool = False
    """Whether ``loss`` takes logits, so that a softmax or sigmoid at a model's end is a mistake."""

    def loss(self, options: TargetOptions) -> Loss | None:
        """Returns the usual loss; None if a task must state its own.

        It must be the mean over the examples of a batch of each example's own loss: then clients
        train alike alone, side by side, and under example-level privacy.
        """
        return None

    def metrics(self, options: TargetOptions) -> tuple[Metric, ...]:
        """Returns the usual metrics, the primary one first; empty if a task must state its own."""
        return ()

    def wrong_outputs(self, outputs: OutputForm) -> str:
        """Returns why outputs of this form cannot be of this kind, with the remedy; else empty."""
        return ""

    def labels(self, outputs: OutputForm) -> int | None:
        """Returns how many names ``Task.labels`` has, if any; None if the kind has no labels."""
        return None

    def canonical(self, targets: Tensor, outputs: OutputForm, options: TargetOptions) -> Tensor:
        """Returns targets ``(B, ...)`` in the form that loss and metrics take.

        What a row becomes depends on that row alone, so under example-level privacy one example
        cannot change what is made of another. Targets that are canonical are returned unchanged.

        Raises:
            TargetFault: rows cannot be brought to that form without a guess.
        """
        return targets

    def synthetic(self, outputs: Tensor, rng: torch.Generator) -> Iterator[Tensor]:
        """Yields random canonical targets for outputs ``(B, ...)``, the likeliest form first.

        Example-level privacy tries a loss on them before it reads any example.
        """
        count = len(outputs)
        yield torch.randn(tuple(outputs.shape), generator=rng)
        yield torch.randn((count,), generator=rng)
        classes = outputs.shape[-1] if outputs.dim() > 1 else 2
        yield torch.arange(count) % classes  # always more than one class
        yield torch.randint(classes, tuple(outputs.shape[:-1]), generator=rng)
        yield torch.randint(2, tuple(outputs.shape), generator=rng).float()

    def outlier(self, targets: Tensor) -> Tensor:
        """Returns canonical targets ``(B, ...)`` of which the first is far from the others.

        That tells a mean over examples from a root or ratio over the batch. Class numbers stay.
        """
        if not targets.is_floating_point():
            return targets
        return torch.cat([targets[:1] * 100, targets[1:]])

    def distance(self, own: Tensor, told: Tensor, targets: Tensor, loss: Loss) -> Tensor:
        """Returns how far a model's outputs are from its teacher's, a scalar on the loss's scale.

        Args:
            own: Outputs of the model in training, ``(B, ...)``.
            told: Outputs of the teacher, of the same shape, without gradient.
            targets: Canonical targets of the batch.
            loss: The task's loss.
        """
        return nn.functional.mse_loss(own, told)

    def agreement(self, reference: NDArray[np.float32], candidate: NDArray[np.float32]) -> float:
        """Returns the share of equal decisions of two models, from 0 to 1."""
        return agreement(reference, candidate, presentation=self.presentation)
