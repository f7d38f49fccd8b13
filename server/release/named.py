"""Several inputs by name, as the manifest of a release describes them."""

from __future__ import annotations

from pydantic import ValidationError

from fedcore.artifacts.manifest import MOST_INPUTS, NamedTensor
from fedcore.errors import TaskError
from fedcore.observability.faults import first_fault
from fedcore.task.named import NamedInputs


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
