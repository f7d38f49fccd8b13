"""A task's data as training, evaluation and calibration take them: canonical inputs and targets.

In: what a task's loader returns. Out: the same examples, with inputs in the dtype of
``example_input`` and targets in the form that the loss takes. Start with `task_examples`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils.data import Subset, TensorDataset

from fedcore.errors import DataError
from fedcore.task.definition import Examples, Folder, Task, read_examples, size_of
from fedcore.task.kinds.protocol import TargetFault
from fedcore.task.kinds.targets import rows_of
from fedcore.training.batches import BatchReader, gather


class TaskExamples(BatchReader):
    """Examples that become canonical when they are read; each depends on itself alone."""

    def __init__(self, task: Task, dataset: Examples, what: str) -> None:
        self.task, self.dataset, self.what = task, dataset, what

    def __len__(self) -> int:
        """Returns the number of examples."""
        return size_of(self.dataset)

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
        """Returns one example."""
        inputs, targets = self.rows([row])
        return inputs[0], targets[0]

    def rows(self, rows: Sequence[int] | Tensor) -> tuple[Tensor, Tensor]:
        """Returns the examples of the given rows as one batch.

        Raises:
            DataError: an example cannot be read, or its input or target cannot be used without a
                guess; the message names the first row.
        """
        try:
            inputs, targets = gather(self.dataset, rows)
        except DataError as error:
            raise DataError(f"{self.what}: {str(error).removeprefix('data: ')}") from error
        numbers = torch.as_tensor(rows)
        inputs = canonical_inputs(self.task, inputs, numbers, what=self.what)
        return inputs, canonical_targets(self.task, targets, numbers, what=self.what)


def task_examples(
    task: Task, load: Callable[[], Examples], *, what: str, folder: Folder, least: int = 1
) -> Examples:
    """Reads a task's data, in canonical form.

    Rows that cannot be used raise a `DataError` where they are read, not here: under example-level
    privacy they count as zero, and whether there are any is private.

    Args:
        task: The task.
        load: Returns its data set.
        what: What the data are, for errors.
        folder: The folder that the loader receives, for errors.
        least: Least number of examples: 0 or 1.

    Raises:
        DataError: the loader failed, or returned fewer than ``least`` examples.
    """
    return canonical(task, read_examples(load, what=what, folder=folder, least=least), what=what)


def canonical(task: Task, examples: Examples, *, what: str) -> Examples:
    """Returns a data set in canonical form: itself if it has that form already."""
    wrapped = TaskExamples(task, examples, what)
    whole: object = examples
    while isinstance(whole, Subset):
        whole = whole.dataset
    if not isinstance(whole, TensorDataset) or len(whole.tensors) != 2 or not size_of(examples):
        return wrapped
    given, targets = whole.tensors
    is_part = whole is not examples
    if is_part and given.dtype != task.example_input.dtype:
        return wrapped
    try:
        if is_part:  # the inputs are right: look at the targets alone
            _, targets = gather(_of_targets(examples, targets), range(size_of(examples)))
            found = canonical_targets(task, targets, torch.arange(len(targets)), what=what)
            return examples if found is targets else wrapped
        numbers = torch.arange(len(targets))
        inputs = canonical_inputs(task, given, numbers, what=what)
        found = canonical_targets(task, targets, numbers, what=what)
    except DataError:
        return wrapped
    if inputs is given and found is targets:
        return examples
    return TensorDataset(inputs, found)  # type: ignore[return-value]


def canonical_targets(task: Task, targets: Tensor, numbers: Tensor, *, what: str) -> Tensor:
    """Returns targets ``(B, ...)`` in the form that the task's loss takes.

    Raises:
        DataError: a target cannot be used without a guess.
    """
    try:
        return task.targets.apply(targets)
    except TargetFault as fault:
        row, more = int(numbers[fault.rows[0]]), len(fault.rows) - 1
        also = f" (and {more} more of {len(targets)})" if more else ""
        raise DataError(
            f"{what}: row {row}{also}: the target is {fault.got}, expected {fault.expected}. "
            f"These examples were not used; {fault.remedy}."
        ) from None


def canonical_inputs(task: Task, inputs: Tensor, numbers: Tensor, *, what: str) -> Tensor:
    """Returns inputs ``(B, ...)`` in the dtype of the task's ``example_input``.

    Integers and bools keep their value exactly, and floats are rounded to the wanted precision.
    Floats do not become integers: in the range 0 to 1 they have another scale.

    Raises:
        DataError: the dtype would change the meaning of an input, or its value.
    """
    wanted = task.example_input.dtype
    if inputs.dtype == wanted:
        return inputs
    if (
        inputs.is_complex()
        or wanted.is_complex
        or (inputs.is_floating_point() and not wanted.is_floating_point)
    ):
        scale = (
            " (uint8 counts from 0 to 255, floats often from 0 to 1)"
            if (wanted == torch.uint8)
            else ""
        )
        raise DataError(
            f"{what}: row {int(numbers[0])}: inputs are {inputs.dtype}, but example_input of task "
            f"{task.name!r} is {wanted}{scale}: a conversion could change their meaning. These "
            f"examples were not used; give inputs of {wanted} on their scale, or give "
            "example_input the dtype of all data."
        )
    converted = inputs.to(wanted)
    if inputs.is_floating_point():
        odd = torch.isfinite(inputs) & ~torch.isfinite(converted)
    else:
        odd = converted.to(inputs.dtype) != inputs
        if wanted == torch.bool:
            odd = (inputs != 0) & (inputs != 1)
        elif wanted.is_floating_point and inputs.dtype in (torch.int32, torch.int64):
            odd |= converted.double() != inputs.double()
    if bool(odd.any()):
        rows = rows_of(odd)
        value = inputs[odd].flatten()[0].item()
        raise DataError(
            f"{what}: row {int(numbers[rows[0]])}: the input has the value {value:g} of "
            f"{inputs.dtype}, which {wanted}, the dtype of example_input of task {task.name!r}, "
            "cannot represent. These examples were not used; scale the inputs, or give "
            "example_input the dtype of all data."
        )
    return converted


def _of_targets(examples: Examples, targets: Tensor) -> Examples:
    """Returns the rows of a subset of a `TensorDataset`, with targets in place of inputs."""
    if isinstance(examples, Subset):
        return Subset(_of_targets(examples.dataset, targets), examples.indices)
    return TensorDataset(targets, targets)  # type: ignore[return-value]
