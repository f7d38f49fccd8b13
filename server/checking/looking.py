"""Looks at the rows of one data set, and says which do not fit the task and its model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fedcore.errors import DataError
from fedcore.observability.foreign import foreign
from fedcore.observability.words import counted
from fedcore.task.definition import Examples, Task, size_of
from fedcore.task.kinds.protocol import TargetFault
from fedcore.training.examples import canonical_inputs
from server.checking.features import ClientRanges
from server.checking.rows import BadRow, RowBlock, blocks

_FORM = "each example must be a pair (input, target) of tensors or numbers"
_REMEDIES = {
    "unreadable": "mend or leave out this row in the data, or in the task's loader",
    "inputs": "mend or leave out this row in the data, or in the task's loader",
    "form": f"{_FORM}",
    "input type": f"{_FORM}",
    "target type": "give the class's number, and put the names in the task's `labels`",
}


@dataclass(frozen=True)
class Expected:
    """What every data set of a task must be like."""

    task: Task
    missing: Tensor
    """Bool, in the shape of one input: where the task's preprocessing takes NaN."""


@dataclass(frozen=True)
class DataFault:
    """A kind of fault in one data set, with the first row that has it."""

    kind: str
    row: int | None
    text: str
    """What was got against what was expected, and the remedy."""
    column: tuple[int, ...] | None = None
    required: bool = True


@dataclass
class Looked:
    """What was seen of one data set."""

    count: int
    rows: int = 0
    """Rows looked at."""
    faults: list[DataFault] = field(default_factory=list)
    form: str = ""
    """Dtypes and shapes of the first row that could be read."""
    ends: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Of whole-number inputs: minus the smallest (``low``) and the largest (``high``), each with
    its row."""


def look_at(
    examples: Examples,
    expected: Expected,
    *,
    rows: Sequence[int],
    ranges: ClientRanges | None = None,
    more: Callable[[], bool] = lambda: True,
) -> Looked:
    """Looks at rows of a data set; a kind of fault is reported once, with its number of rows.

    Args:
        examples: The data set; its rows may be anything, or raise anything.
        expected: What rows must be like.
        rows: Row numbers to look at, in this order.
        ranges: Collector of the inputs' ranges.
        more: Asked before each block; False ends the work.
    """
    looked = Looked(size_of(examples))
    seen: dict[str, _Seen] = {}
    ends: dict[str, tuple[int, int]] = {}
    for block in blocks(examples, rows, more=more):
        if isinstance(block, BadRow):
            looked.rows += 1
            _note(seen, block.kind, 1, block.row, foreign(block.got), _REMEDIES[block.kind])
            continue
        looked.rows += len(block.rows)
        looked.form = looked.form or _form_of(block)
        if _inputs_fit(block, expected, seen):
            if ranges is not None:
                ranges.add(block.rows, block.inputs)
            _track_ends(block, ends)
        _check_targets(block, expected, seen)
    looked.ends = ends
    looked.faults = [one.fault(kind) for kind, one in seen.items()]
    return looked


@dataclass
class _Seen:
    row: int
    got: str
    remedy: str
    column: tuple[int, ...] | None
    count: int = 0

    def fault(self, kind: str) -> DataFault:
        others = f", and {counted(self.count - 1, 'other row')}" if self.count > 1 else ""
        return DataFault(
            kind, self.row, f"row {self.row}{others}: {self.got}; {self.remedy}", self.column
        )


def _note(
    seen: dict[str, _Seen],
    kind: str,
    count: int,
    row: int,
    got: str,
    remedy: str,
    column: tuple[int, ...] | None = None,
) -> None:
    found = seen.setdefault(kind, _Seen(row, got, remedy, column))
    found.count += count


def _form_of(block: RowBlock) -> str:
    inputs, targets = block.inputs, block.targets
    return (
        f"inputs {inputs.dtype} {tuple(inputs.shape[1:])}, "
        f"targets {targets.dtype} {tuple(targets.shape[1:])}"
    )


def _inputs_fit(block: RowBlock, expected: Expected, seen: dict[str, _Seen]) -> bool:
    """Notes inputs that differ from the task's example; returns whether their form is right."""
    inputs, example, rows = block.inputs, expected.task.example_input, block.rows
    if inputs.shape[1:] != example.shape:
        got = f"inputs are {tuple(inputs.shape[1:])}, expected {tuple(example.shape)}"
        remedy = "give every input the shape of example_input: crop, pad or resize it in the loader"
        _note(seen, "shape", len(rows), rows[0], got, remedy)
        return False
    if not _converts(block, expected.task, seen):
        return False
    if inputs.is_floating_point() or inputs.is_complex():
        odd = ~torch.isfinite(inputs) & ~(torch.isnan(inputs) & expected.missing)
        if bool(odd.any()):
            _note_not_finite(odd, block, expected.task, seen)
    return True


def _converts(block: RowBlock, task: Task, seen: dict[str, _Seen]) -> bool:
    """Notes inputs whose dtype cannot become the example's without a guess."""
    inputs, numbers = block.inputs, torch.as_tensor(block.rows)
    try:
        canonical_inputs(task, inputs, numbers, what="inputs")
    except DataError as error:
        row, _, said = str(error).removeprefix("inputs: row ").partition(": ")
        low, high = inputs.double().aminmax()
        remedy = f"they range from {low:g} to {high:g}"
        _note(seen, "dtype", len(block.rows), int(row), said.rstrip("."), remedy)
        return False
    return True


def _note_not_finite(odd: Tensor, block: RowBlock, task: Task, seen: dict[str, _Seen]) -> None:
    flat = odd.reshape(len(odd), -1)
    first = tuple(torch.nonzero(odd)[0].tolist())
    value = block.inputs[first].item()
    got = f"{position_text(task, first[1:])} is {value}, expected a finite number"
    remedy = (
        "fill or leave out such rows, or have the task's preprocess turn NaN into a number"
        if value != value
        else "bound or leave out such rows in the loader"
    )
    count = int(flat.any(dim=1).sum())
    _note(seen, "not finite", count, block.rows[first[0]], got, remedy, first[1:])


def position_text(task: Task, place: tuple[int, ...]) -> str:
    """Returns the name of a number in an input: its column, or its position."""
    if task.named_inputs is not None:
        return task.named_inputs.place(place[0])
    if not place:
        return "the input"
    return f"column {place[0]}" if len(place) == 1 else f"position {place}"


def _check_targets(block: RowBlock, expected: Expected, seen: dict[str, _Seen]) -> None:
    try:
        expected.task.targets.apply(block.targets)
    except TargetFault as fault:
        got = f"the target is {fault.got}, expected {fault.expected}"
        _note(seen, "target", len(fault.rows), block.rows[fault.rows[0]], got, fault.remedy)


def _track_ends(block: RowBlock, ends: dict[str, tuple[int, int]]) -> None:
    """Remembers which rows hold the smallest and the largest number, as tokens may be unknown."""
    inputs = block.inputs
    if inputs.is_floating_point() or inputs.is_complex() or not inputs.numel():
        return
    flat = inputs.reshape(len(inputs), -1).long()
    for side, best in (("low", -flat.amin(dim=1)), ("high", flat.amax(dim=1))):
        value, place = int(best.max()), int(best.argmax())
        if side not in ends or value > ends[side][0]:
            ends[side] = (value, block.rows[place])
