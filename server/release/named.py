"""Several inputs and outputs by name, as the manifest of a release describes them."""

from __future__ import annotations

import numpy as np
from pydantic import ValidationError

from fedcore.artifacts.golden import Golden
from fedcore.artifacts.manifest import MOST_INPUTS, MOST_OUTPUTS, NamedOutput, NamedTensor
from fedcore.errors import TaskError
from fedcore.observability.faults import first_fault
from fedcore.task.definition import Task
from fedcore.task.kinds.protocol import Kind
from fedcore.task.kinds.several import SeveralOutputs
from fedcore.task.named import NamedInputs


def describable(task: Task) -> None:
    """Checks, before there is a model, that a manifest can describe a task's inputs and outputs.

    Raises:
        TaskError: it cannot.
    """
    named_tensors(task.named_inputs, task=task.name)
    named_outputs(task.problem, None, 1.0, task=task.name)


def named_tensors(inputs: NamedInputs | None, *, task: str) -> tuple[NamedTensor, ...] | None:
    """Returns a manifest's description of a task's named inputs; None for one without a name.

    Args:
        inputs: Names, shapes and dtypes, in the order of the vector that the model takes.
        task: Name of the task, for errors.

    Raises:
        TaskError: a manifest cannot describe them.
    """
    if inputs is None:
        return None
    if len(inputs.names) > MOST_INPUTS:
        raise TaskError(
            f"task {task!r}: it has {len(inputs.names)} named inputs, and a release describes at "
            f"most {MOST_INPUTS}. Nothing was published; leave [release] out, or join inputs."
        )
    described = []
    for name, shape, dtype in zip(inputs.names, inputs.shapes, inputs.dtypes, strict=True):
        kind = str(dtype).removeprefix("torch.")
        try:
            described.append(
                NamedTensor.model_validate({"name": name, "dtype": kind, "shape": shape})
            )
        except ValidationError as error:
            raise TaskError(
                f"task {task!r}: a release cannot describe its input {name!r}: "
                f"{first_fault(error)}. Nothing was published; leave [release] out, or give the "
                "input a name of 1 to 64 printable ASCII characters and at most 16 dimensions."
            ) from None
    return tuple(described)


_LEAST = 1e-6  # outputs that are always 0 have the tolerance of this one


def named_outputs(
    kind: Kind, golden: Golden | None, tolerance: float, *, task: str
) -> tuple[NamedOutput, ...] | None:
    """Returns a manifest's description of a task's named outputs; None for one without a name.

    Each has a tolerance of its own, by its largest golden number: outputs may differ in scale, and
    that of the largest would let all others be wrong.

    Args:
        kind: The task's kind.
        golden: Golden outputs ``(N, ...)``; None before there are any.
        tolerance: The tolerance of all outputs together.
        task: Name of the task, for errors.

    Raises:
        TaskError: a manifest cannot describe them.
    """
    if not isinstance(kind, SeveralOutputs):
        return None
    if len(kind.parts) > MOST_OUTPUTS:
        raise TaskError(
            f"task {task!r}: it has {len(kind.parts)} named outputs, and a release describes at "
            f"most {MOST_OUTPUTS}. Nothing was published; leave [release] out, or join outputs."
        )
    described = []
    for part in kind.parts:
        allowed = tolerance
        if golden is not None and golden.places is None:
            whole = max(float(np.abs(golden.outputs).max(initial=0.0)), _LEAST)
            largest = max(float(np.abs(part.array(golden.outputs)).max(initial=0.0)), _LEAST)
            allowed = tolerance * largest / whole
        try:
            described.append(
                NamedOutput(
                    name=part.name,
                    shape=tuple(part.form.shape),
                    presentation=part.kind.presentation,
                    labels=part.labels,
                    tolerance=allowed,
                )
            )
        except ValidationError as error:
            raise TaskError(
                f"task {task!r}: a release cannot describe its output {part.name!r}: "
                f"{first_fault(error)}. Nothing was published; leave [release] out, or give the "
                "output a name of 1 to 64 printable ASCII characters, at least one number and at "
                "most 16 dimensions."
            ) from None
    return tuple(described)
