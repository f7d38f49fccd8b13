"""Several outputs by name, each of a kind of its own; between model and loss they are one vector.

Everything that trains, protects, compresses and evaluates models takes the vector like any other
output. Start with `SeveralOutputs`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedcore.artifacts.presentation import Presentation
from fedcore.task.kinds.protocol import Kind, Loss, OutputForm, TargetFault, TargetOptions
from fedcore.task.metrics import Metric
from fedcore.task.statistics import Shape, Statistics

_PLAIN = TargetOptions()


@dataclass(frozen=True)
class OutputPart:
    """One of several outputs: what it means, and where it is in the vectors."""

    name: str
    kind: Kind
    form: OutputForm
    target: OutputForm
    """Form of a canonical target."""
    labels: tuple[str, ...]
    """Names of its classes; empty if they have none."""
    start: int
    """Place of its first number among the outputs; ``target_start`` among the targets."""
    target_start: int

    @property
    def stop(self) -> int:
        """Place after its last number among the outputs."""
        return self.start + self.form.shape.numel()

    @property
    def target_stop(self) -> int:
        """Place after its last number among the targets."""
        return self.target_start + self.target.shape.numel()

    def outputs(self, packed: Tensor) -> Tensor:
        """Returns this output ``(B, ...)`` from vectors ``(B, N)``."""
        return packed[:, self.start : self.stop].reshape(-1, *self.form.shape)

    def targets(self, packed: Tensor) -> Tensor:
        """Returns its targets ``(B, ...)`` from vectors ``(B, M)``."""
        found = packed[:, self.target_start : self.target_stop]
        return found.reshape(-1, *self.target.shape).to(self.target.dtype)

    def array(self, packed: NDArray[np.float32]) -> NDArray[np.float32]:
        """Returns this output ``(B, ...)`` from an array of vectors ``(B, N)``."""
        return packed[:, self.start : self.stop].reshape(-1, *self.form.shape)

    @property
    def loss(self) -> Loss:
        """The kind's usual loss."""
        found = self.kind.loss(_PLAIN)
        assert found is not None  # checked where the parts are made
        return found


@dataclass(frozen=True)
class SeveralOutputs(Kind):
    """Outputs ``(B, N)`` that hold several, one after the other; targets ``(B, M)`` likewise.

    The usual loss is the sum of the losses of the parts, and the metrics are those of the parts,
    under names such as ``species_accuracy``.
    """

    parts: tuple[OutputPart, ...] = ()
    name: str = "several"
    presentation: Presentation = "values"

    def loss(self, options: TargetOptions) -> Loss:
        """Returns the sum of the parts' usual losses."""
        return _SumOfLosses(self.parts)

    def metrics(self, options: TargetOptions) -> tuple[Metric, ...]:
        """Returns the usual metrics of each part, those of the first part first."""
        return tuple(
            _metric(part, each) for part in self.parts for each in part.kind.metrics(_PLAIN)
        )

    def canonical(self, targets: Tensor, outputs: OutputForm, options: TargetOptions) -> Tensor:
        """Returns the targets, each in the form that its part's loss takes."""
        found = [_canonical(part, targets) for part in self.parts]
        made = torch.cat(
            [each.reshape(len(targets), -1).to(targets.dtype) for each in found], dim=1
        )
        return targets if torch.equal(made, targets) else made

    def synthetic(self, outputs: Tensor, rng: torch.Generator) -> Iterator[Tensor]:
        """Yields the likeliest targets of all parts."""
        found = [next(part.kind.synthetic(part.outputs(outputs), rng)) for part in self.parts]
        yield torch.cat([each.reshape(len(outputs), -1).float() for each in found], dim=1)

    def outlier(self, targets: Tensor) -> Tensor:
        """Returns targets of which the first is far from the others in each part of quantities."""
        found = [part.kind.outlier(part.targets(targets)) for part in self.parts]
        flat = [each.reshape(len(targets), -1).to(targets.dtype) for each in found]
        return torch.cat(flat, dim=1)

    def distance(self, own: Tensor, told: Tensor, targets: Tensor, loss: Loss) -> Tensor:
        """Returns the sum of the parts' distances, or a task's own loss against the teacher.

        An own loss weighs the parts as it does in training; it takes decisions of classes.
        """
        if isinstance(loss, NamedFunction):
            return cast(Tensor, loss(own, self._decided(told)))
        distances = [
            part.kind.distance(
                part.outputs(own), part.outputs(told), part.targets(targets), part.loss
            )
            for part in self.parts
        ]
        return torch.stack(distances).sum()

    def _decided(self, told: Tensor) -> Tensor:
        """Returns what a teacher's outputs ``(B, N)`` say as targets ``(B, M)``."""
        found = []
        for part in self.parts:
            outputs, how = part.outputs(told), part.kind.presentation
            if how in ("binary", "labels"):
                outputs = outputs.sigmoid()
            elif how != "values":
                outputs = outputs.argmax(dim=1 if how == "dense" else -1).to(told.dtype)
            found.append(outputs.reshape(len(told), -1))
        return torch.cat(found, dim=1)

    def agreement(self, reference: NDArray[np.float32], candidate: NDArray[np.float32]) -> float:
        """Returns the agreement of the part that agrees least."""
        return min(
            part.kind.agreement(part.array(reference), part.array(candidate)) for part in self.parts
        )

    def pack(self, outputs: Mapping[str, Tensor]) -> Tensor:
        """Returns vectors ``(B, N)`` from outputs ``(B, ...)`` by name."""
        found = [outputs[part.name] for part in self.parts]
        return torch.cat([each.reshape(len(each), -1) for each in found], dim=1)

    def by_name(self, packed: Tensor) -> dict[str, Tensor]:
        """Returns the outputs ``(B, ...)`` by name from vectors ``(B, N)``."""
        return {part.name: part.outputs(packed) for part in self.parts}

    def targets_by_name(self, packed: Tensor) -> dict[str, Tensor]:
        """Returns the targets ``(B, ...)`` by name from vectors ``(B, M)``."""
        return {part.name: part.targets(packed) for part in self.parts}


def _canonical(part: OutputPart, targets: Tensor) -> Tensor:
    raw = targets[:, part.target_start : part.target_stop].reshape(-1, *part.target.shape)
    try:
        return part.kind.canonical(raw, part.form, _PLAIN)
    except TargetFault as fault:
        raise TargetFault(
            fault.rows, f"{fault.got} for output {part.name!r}", fault.expected, fault.remedy
        ) from None


@dataclass(frozen=True)
class _SumOfLosses:
    parts: tuple[OutputPart, ...]

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        losses = [part.loss(part.outputs(outputs), part.targets(targets)) for part in self.parts]
        return torch.stack(losses).sum()


@dataclass(frozen=True)
class NamedFunction:
    """A function of outputs and targets by name, for vectors of both."""

    function: Callable[[Mapping[str, Tensor], Mapping[str, Tensor]], Any]
    kind: SeveralOutputs

    def __call__(self, outputs: Tensor, targets: Tensor) -> Any:
        """Returns what the function does."""
        return self.function(self.kind.by_name(outputs), self.kind.targets_by_name(targets))


@dataclass(frozen=True)
class _OfPart:
    """A function of the outputs and targets of one part, for vectors of all."""

    function: Callable[[Tensor, Tensor], Any]
    part: OutputPart

    def __call__(self, outputs: Tensor, targets: Tensor) -> Any:
        return self.function(self.part.outputs(outputs), self.part.targets(targets))


@dataclass(frozen=True)
class _OfShape:
    """What follows from the shape of one part's outputs."""

    given: Any
    part: OutputPart

    def __call__(self, shape: Shape) -> Any:
        return self.given(tuple(self.part.form.shape)) if callable(self.given) else self.given


def _metric(part: OutputPart, metric: Metric) -> Metric:
    statistics, compute = metric.statistics, metric.compute
    if statistics is None:
        made: Callable[[Tensor, Tensor], float] = _OfPart(compute, part)
    else:
        made = Statistics(
            _OfPart(statistics.sums, part),
            statistics.value,
            _OfShape(statistics.limits, part),
            _OfShape(statistics.total, part),
            statistics.is_share,
        )
    return replace(metric, name=f"{part.name}_{metric.name}", compute=made)
