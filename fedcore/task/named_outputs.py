"""Models with several outputs by name, and data with targets by the same names.

In: a task with a kind for each output. Out: a `SeveralOutputs` kind, and wrappers that make one
vector of a model's outputs, and one of an example's targets. Start with `several_outputs`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Sized
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset, TensorDataset, default_collate

from fedcore.errors import DataError, TaskError
from fedcore.observability.words import counted
from fedcore.seeds import global_streams, torch_rng
from fedcore.task.kinds.protocol import Kind, OutputForm, TargetOptions
from fedcore.task.kinds.several import NamedFunction, OutputPart, SeveralOutputs
from fedcore.task.metrics import Metric
from fedcore.task.reading import Examples

Labels = Mapping[str, Sequence[str]]


def several_outputs(
    kinds: Mapping[str, Kind],
    labels: Labels,
    model: Callable[[], nn.Module],
    preprocess: Callable[[], nn.Module] | None,
    example: Tensor,
    *,
    task: str,
) -> SeveralOutputs:
    """Returns the kind of a task with a kind for each output, from one run of a fresh model.

    Args:
        kinds: The kind of each output, in the order of the vector.
        labels: Names of classes, of outputs that have them.
        model: Builds the model, which returns a dictionary of outputs ``(B, ...)``.
        preprocess: Builds what runs before the model.
        example: One input.
        task: Name of the task, for errors.

    Raises:
        TaskError: the model fails, or gives other outputs; or labels fit no output.
    """
    if stray := set(labels) - set(kinds):
        raise TaskError(
            f"task {task!r}: labels name the output {sorted(stray)[0]!r}, and kind has "
            f"{', '.join(kinds) or 'none'}. Nothing was run; correct the task file."
        )
    found = _outputs(model, preprocess, example, task=task)
    got = list(found) if isinstance(found, Mapping) else type(found).__name__
    if not isinstance(found, Mapping) or set(found) != set(kinds) or not kinds:
        raise TaskError(
            f"task {task!r}: kind names the outputs {', '.join(kinds) or 'none'}, and the model "
            f"gives {got}. Nothing was run; return a dictionary with a tensor for each of them."
        )
    parts: list[OutputPart] = []
    start = target_start = 0
    for name, kind in kinds.items():
        made = _part(name, kind, found[name], tuple(labels.get(name, ())), task=task)
        parts.append(replace(made, start=start, target_start=target_start))
        start, target_start = parts[-1].stop, parts[-1].target_stop
    return SeveralOutputs(tuple(parts))


def _outputs(
    model: Callable[[], nn.Module],
    preprocess: Callable[[], nn.Module] | None,
    example: Tensor,
    *,
    task: str,
) -> Any:
    try:
        with global_streams(0, "outputs"), torch.no_grad():
            before = preprocess() if preprocess else nn.Identity()
            return model().eval()(before.eval()(torch.stack([example] * 2)))
    except (Exception, SystemExit) as error:  # the task's code may raise anything
        raise TaskError(
            f"task {task!r}: its model fails on example_input: {type(error).__name__}: {error}. "
            "Nothing was run; make example_input one input of the model, without the batch "
            "dimension."
        ) from error


def _part(name: str, kind: Kind, output: Any, labels: tuple[str, ...], *, task: str) -> OutputPart:
    if not isinstance(output, Tensor) or output.shape[:1] != (2,):
        got = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise TaskError(
            f"task {task!r}: for 2 inputs its model's output {name!r} is {got}, expected a tensor "
            "with as many rows. Nothing was run; correct the model."
        )
    form = OutputForm(output.shape[1:], output.dtype)
    if wrong := kind.wrong_outputs(form):
        raise TaskError(f"task {task!r}: its model's output {name!r}: {wrong}. Nothing was run.")
    if kind.loss(TargetOptions()) is None or isinstance(kind, SeveralOutputs):
        raise TaskError(
            f"task {task!r}: output {name!r} has kind {kind.name!r}, which has no usual loss. "
            "Nothing was run; give the kind a loss."
        )
    classes = kind.labels(form)
    if labels and len(labels) != classes:
        raise TaskError(
            f"task {task!r}: output {name!r} has {counted(len(labels), 'label')} for "
            f"{classes or 0} classes. Nothing was run; name each class once."
        )
    likely = next(kind.synthetic(output.float(), torch_rng(0, "targets")))
    target = OutputForm(likely.shape[1:], likely.dtype)
    return OutputPart(name, kind, form, target, labels, 0, 0)


@dataclass(frozen=True)
class SeveralModel:
    """A task's model builder, for models that return outputs by name."""

    inner: Callable[[], nn.Module]
    kind: SeveralOutputs

    def __call__(self) -> nn.Module:
        """Returns the model, whose outputs are vectors; the names of its weights stay."""
        model = self.inner()
        model.register_forward_hook(_Pack(self.kind))
        return model


@dataclass(frozen=True)
class _Pack:
    kind: SeveralOutputs

    def __call__(self, module: nn.Module, arguments: tuple[Any, ...], outputs: Any) -> Any:
        return self.kind.pack(outputs) if isinstance(outputs, Mapping) else outputs


class TargetsByName(Dataset[tuple[Any, Tensor]]):
    """A data set of examples with targets by name, which become one vector."""

    def __init__(self, dataset: Dataset[Any], kind: SeveralOutputs) -> None:
        self.dataset, self._kind = dataset, kind

    def __len__(self) -> int:
        """Returns the number of examples."""
        return len(cast(Sized, self.dataset))

    def __getitem__(self, row: int) -> Any:
        """Returns an example with its targets as one vector; any other row stays as it is."""
        found: Any = self.dataset[row]
        is_pair = isinstance(found, tuple | list) and len(found) == 2
        if not is_pair or isinstance(found[1], Tensor):
            return found
        return found[0], _vector(self._kind, found[1])


def _vector(kind: SeveralOutputs, targets: Any) -> Tensor:
    names = [part.name for part in kind.parts]
    if not isinstance(targets, Mapping) or set(targets) != set(names):
        named = isinstance(targets, Mapping)
        got = ", ".join(map(repr, targets)) if named else f"a {type(targets).__name__}"
        raise DataError(f"its targets are {got}, expected {', '.join(map(repr, names))}")
    return torch.cat([_target(part, targets[part.name]) for part in kind.parts])


def _target(part: OutputPart, value: Any) -> Tensor:
    try:
        found = default_collate([value])
    except (RuntimeError, TypeError, ValueError):
        found = None
    wanted = part.target.shape
    if not isinstance(found, Tensor) or found.is_complex() or found.numel() != wanted.numel():
        got = tuple(found.shape[1:]) if isinstance(found, Tensor) else type(value).__name__
        raise DataError(
            f"its target {part.name!r} is {got}, expected a tensor of shape {tuple(wanted)}"
        )
    return found.flatten().float()


@dataclass(frozen=True)
class TargetsLoader:
    """A task's loader, for targets as vectors."""

    inner: Callable[..., Any]
    kind: SeveralOutputs

    def __call__(self, *arguments: Any) -> Examples:
        """Returns the data set that the loader returns; one of vectors stays as it is."""
        found = self.inner(*arguments)
        whole = found
        while isinstance(whole, Subset):
            whole = whole.dataset
        if isinstance(whole, TensorDataset | TargetsByName) or not hasattr(found, "__getitem__"):
            return cast(Examples, found)
        return cast(Examples, TargetsByName(found, self.kind))


def loss_of(loss: Any, kind: SeveralOutputs) -> Any:
    """Returns a task's own loss, which takes outputs and targets by name, for vectors."""
    if loss is None or loss == kind.loss(TargetOptions()) or isinstance(loss, NamedFunction):
        return loss
    return NamedFunction(loss, kind)


def metric_of(metric: Any, kind: SeveralOutputs) -> Any:
    """Returns a task's own metric, which takes outputs and targets by name, for vectors."""
    if not isinstance(metric, Metric) or metric in kind.metrics(TargetOptions()):
        return metric
    statistics = metric.statistics
    if statistics is None:
        if isinstance(metric.compute, NamedFunction):
            return metric
        return replace(metric, compute=NamedFunction(metric.compute, kind))  # type: ignore[arg-type]
    if isinstance(statistics.sums, NamedFunction):
        return metric
    named = replace(statistics, sums=NamedFunction(statistics.sums, kind))  # type: ignore[arg-type]
    return replace(metric, compute=named)
