"""Brings targets to the form that a task's loss takes, and metrics to shapes that fit.

Usual losses take a kind's canonical targets. A user's own loss may take another form of them, such
as ``(B,)`` where outputs are ``(B, 1)``; a few synthetic targets show which.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch
from torch import Tensor

from fedcore.seeds import global_streams
from fedcore.task.kinds.protocol import Kind, Loss, OutputForm, TargetFault, TargetOptions
from fedcore.task.metrics import Metric

_TRIED = 8  # synthetic examples
_COMPARED = 64  # rows of a data set on which two shapes are compared

Form = tuple[torch.Size, torch.dtype]


@dataclass(frozen=True)
class TargetRule:
    """Brings a task's targets to the form that its loss takes."""

    kind: Kind
    options: TargetOptions
    outputs: OutputForm | None
    """None if the model's outputs are not known: targets are then left unchanged."""
    own_loss: Loss | None
    """The task's own loss; None if it is the kind's."""
    _kept: dict[Form, bool] = field(default_factory=dict, repr=False)

    def apply(self, targets: Tensor) -> Tensor:
        """Returns targets ``(B, ...)`` for the loss; each row depends on itself alone.

        Raises:
            TargetFault: rows cannot be used without a guess.
        """
        outputs = self.outputs
        if outputs is None or not len(targets) or self.kind.wrong_outputs(outputs):
            return targets
        if self.own_loss is None:
            return self.kind.canonical(targets, outputs, self.options)
        form = targets.shape[1:], targets.dtype
        if form not in self._kept:
            self._kept[form] = self._takes_as_given(outputs, *form)
        if self._kept[form]:
            if self.kind.presentation != "values":
                self.kind.canonical(targets, outputs, self.options)  # refuses what has no meaning
            return targets
        found = self.kind.canonical(targets, outputs, self.options)
        return _aligned(found, outputs)

    def _takes_as_given(self, outputs: OutputForm, shape: torch.Size, dtype: torch.dtype) -> bool:
        """Returns whether the own loss takes targets of this form without a change."""
        assert self.own_loss is not None
        given = _synthetic(self.kind, outputs, shape, dtype)
        answers = torch.randn((_TRIED, *outputs.shape), generator=torch.Generator().manual_seed(1))
        if outputs.dtype.is_floating_point:
            answers = answers.to(outputs.dtype)
        raw = _value(self.own_loss, answers, given)
        try:
            canonical = _aligned(self.kind.canonical(given, outputs, self.options), outputs)
        except TargetFault:
            return raw is not None
        fitted = _value(self.own_loss, answers, canonical)
        if fitted is None:
            return raw is not None
        if self.kind.presentation != "values":  # metrics take canonical targets, too
            return False
        if dtype.is_floating_point and dtype != outputs.dtype:
            return False
        return raw is not None and torch.allclose(raw, fitted, rtol=1e-4, equal_nan=True)


def _aligned(targets: Tensor, outputs: OutputForm) -> Tensor:
    """Returns targets in the outputs' shape where only dimensions of size 1 differ.

    Otherwise ``(B, 1)`` and ``(B,)`` would broadcast to all pairs of examples.
    """
    shape = (len(targets), *outputs.shape)
    squeezed = [size for size in outputs.shape if size != 1]
    if (
        targets.is_floating_point()
        and [size for size in targets.shape[1:] if size != 1] == squeezed
    ):
        return targets.reshape(shape)
    return targets


def _value(loss: Loss, outputs: Tensor, targets: Tensor) -> Tensor | None:
    """Returns a loss's value; None where it fails or gives no single number."""
    try:
        with torch.no_grad(), global_streams(1), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # shapes that broadcast are among what is tried
            found = copy.deepcopy(loss)(outputs, targets)
    except Exception:  # the task's code may raise anything
        return None
    return found.double() if isinstance(found, Tensor) and found.dim() == 0 else None


def _synthetic(kind: Kind, outputs: OutputForm, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Returns targets of 0 and 1 in the given form, one-hot where it is the outputs' shape."""
    rng = torch.Generator().manual_seed(2)
    if shape == outputs.shape and kind.presentation in ("label", "dense"):
        numbers = torch.randint(shape[0], (_TRIED, *shape[1:]), generator=rng)
        one_hot = torch.nn.functional.one_hot(numbers, shape[0]).movedim(-1, 1)
        return one_hot.to(dtype)
    if kind.presentation == "values" and dtype.is_floating_point:
        return torch.randn((_TRIED, *shape), generator=rng).to(dtype)
    return torch.randint(2, (_TRIED, *shape), generator=rng).to(dtype)


def shape_safe(metric: Metric) -> Metric:
    """Returns a metric that does not broadcast outputs ``(N, 1)`` against targets ``(N,)``.

    A metric that handles both shapes itself is computed as it is.
    """
    statistics = metric.statistics
    if statistics is None:
        return replace(metric, compute=_guarded(metric.compute))
    return replace(metric, compute=replace(statistics, sums=_guarded(statistics.sums)))


_Computed = TypeVar("_Computed", float, Tensor)


def _guarded(
    compute: Callable[[Tensor, Tensor], _Computed],
) -> Callable[[Tensor, Tensor], _Computed]:
    def guarded(outputs: Tensor, targets: Tensor) -> _Computed:
        if outputs.shape == targets.shape or outputs.numel() != targets.numel():
            return compute(outputs, targets)
        fitted = outputs.reshape(targets.shape)
        try:
            raw = torch.as_tensor(compute(outputs[:_COMPARED], targets[:_COMPARED]))
        except Exception:  # the task's code may raise anything
            return compute(fitted, targets)
        try:
            other = torch.as_tensor(compute(fitted[:_COMPARED], targets[:_COMPARED]))
            close = bool(((raw - other).abs() <= 1e-6).all())
        except Exception:  # it expects the outputs' own shape
            close = True
        return compute(outputs if close else fitted, targets)

    return guarded
