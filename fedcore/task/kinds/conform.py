"""Brings targets to the form that a task's loss takes, and metrics to shapes that fit.

Usual losses take a kind's canonical targets. A user's own loss may take another form of them, such
as ``(B,)`` where outputs are ``(B, 1)``; a few synthetic targets show which.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal, TypeVar

import torch
from torch import Tensor

from fedcore.seeds import global_streams
from fedcore.task.kinds.protocol import Kind, Loss, OutputForm, TargetFault, TargetOptions
from fedcore.task.metrics import Metric

_TRIED = 8  # synthetic examples
_COMPARED = 64  # rows of a data set on which two shapes are compared

Form = tuple[torch.Size, torch.dtype]
Way = Literal["given", "canonical", "aligned"]
"""How targets reach an own loss: unchanged, in the kind's form, or in the outputs' shape, too."""


@dataclass(frozen=True)
class TargetRule:
    """Brings a task's targets to the form that its loss takes."""

    kind: Kind
    options: TargetOptions
    outputs: OutputForm | None
    """None if the model's outputs are not known: targets are then left unchanged."""
    own_loss: Loss | None
    """The task's own loss; None if it is the kind's."""
    _chosen: dict[Form, Way] = field(default_factory=dict, repr=False)

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
        if form not in self._chosen:
            self._chosen[form] = self._choose(outputs, *form)
        way = self._chosen[form]
        if way == "given" and self.kind.presentation == "values":
            return targets
        found = self.kind.canonical(targets, outputs, self.options)  # refuses what has no meaning
        if way == "given":
            return targets
        return _aligned(found, outputs) if way == "aligned" else found

    def _choose(self, outputs: OutputForm, shape: torch.Size, dtype: torch.dtype) -> Way:
        """Returns how targets of a form reach the own loss: as given where it handles them.

        A loss handles a form if a batch's loss is the mean of those of its examples: where shapes
        broadcast to all pairs of examples it is not.
        """
        assert self.own_loss is not None
        given = _synthetic(self.kind, outputs, shape, dtype)
        answers = torch.randn((_TRIED, *outputs.shape), generator=torch.Generator().manual_seed(1))
        if outputs.dtype.is_floating_point:
            answers = answers.to(outputs.dtype)
        try:
            canonical = self.kind.canonical(given, outputs, self.options)
        except TargetFault:
            return "given"
        ways: dict[Way, Tensor] = {"canonical": canonical, "aligned": _aligned(canonical, outputs)}
        classes = self.kind.presentation != "values"  # metrics take class numbers, too
        if not classes and not (dtype.is_floating_point and dtype != outputs.dtype):
            ways = {"given": given, **ways}
        elif classes:
            ways = {**ways, "given": given}
        values = {way: _value(self.own_loss, answers, each) for way, each in ways.items()}
        taken = [way for way, value in values.items() if value is not None]
        for way in taken:
            if classes or _is_mean(self.own_loss, answers, ways[way]):
                return way
        for way in taken:  # such as a root of a mean: compare with outputs in the targets' shape
            if answers.numel() == ways[way].numel():
                alike = _value(self.own_loss, answers.reshape(ways[way].shape), ways[way])
                value = values[way]
                if alike is not None and value is not None and torch.allclose(alike, value):
                    return way
        return taken[0] if taken else "aligned"


def _is_mean(loss: Loss, outputs: Tensor, targets: Tensor) -> bool:
    whole = _value(loss, outputs, targets)
    each = [_value(loss, outputs[i : i + 1], targets[i : i + 1]) for i in range(len(outputs))]
    single = [one for one in each if one is not None]
    if whole is None or len(single) < len(each):
        return False
    return torch.allclose(torch.stack(single).mean(), whole, rtol=1e-4, atol=1e-6)


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
    except (Exception, SystemExit):  # the task's code may raise anything
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
        except (Exception, SystemExit):  # the task's code may raise anything
            return compute(fitted, targets)
        try:
            other = torch.as_tensor(compute(fitted[:_COMPARED], targets[:_COMPARED]))
            close = bool(((raw - other).abs() <= 1e-6).all())
        except Exception:  # it expects the outputs' own shape
            close = True
        return compute(outputs if close else fitted, targets)

    return guarded
