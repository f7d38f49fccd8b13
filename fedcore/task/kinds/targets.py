"""Steps that bring targets to canonical form; each depends on one row at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from fedcore.task.kinds.protocol import TargetFault, TargetOptions

_PAD_VALUES = (-100, -1, 255)
"""Values that data sets use for positions without a target."""
MULTILABEL = (
    "if an input can have several labels at once, set kind='multilabel'; if it has one, give the "
    "class's number"
)


def squeezed(targets: Tensor, dimensions: int) -> Tensor:
    """Returns targets ``(B, 1, ...)`` as ``(B, ...)`` where that gives ``dimensions``."""
    if targets.dim() == dimensions + 1 and targets.shape[1] == 1:
        return targets.squeeze(1)
    return targets


def whole_numbers(targets: Tensor, *, remedy: str) -> Tensor:
    """Returns targets as int64; floats must be whole."""
    if targets.dtype == torch.long:
        return targets
    if targets.is_complex() or targets.is_quantized:
        raise TargetFault((0,), f"{targets.dtype}", "whole numbers", remedy)
    if targets.is_floating_point():
        wide = targets.double()
        odd = ~((wide == wide.floor()) & (wide.abs() < 2**53))  # also true for NaN
        if bool(odd.any()):
            rows = rows_of(odd)
            raise TargetFault(rows, _first(targets, odd), "a whole number", remedy)
    return targets.long()


def class_numbers(
    targets: Tensor, classes: int, options: TargetOptions, *, expected_of: str = "outputs"
) -> Tensor:
    """Returns int64 targets whose values are 0 to ``classes - 1``, or the ignored one."""
    if not targets.numel():
        return targets
    low, high = (int(value) for value in targets.aminmax())
    if low >= 0 and high < classes:
        return targets
    odd = (targets < 0) | (targets >= classes)
    if options.ignore_index is not None:
        odd &= targets != options.ignore_index
        if not bool(odd.any()):
            return targets
    bad = targets[odd]
    value, counted = int(bad.flatten()[0]), targets[~odd]
    least = int(counted.min()) if counted.numel() else 1
    if value == classes and least >= 1:
        remedy = f"if classes are numbered from 1, subtract 1; for more classes, give {expected_of}"
        remedy += " for each"
    elif value in _PAD_VALUES:
        remedy = f"set ignore_index={value} in the task if it marks what has no target"
    else:
        remedy = f"number the classes from 0, or give the model {expected_of} for each class"
    expected = f"a whole number from 0 to {classes - 1} for {classes} {expected_of}"
    raise TargetFault(rows_of(odd), str(value), expected, remedy)


def from_one_hot(targets: Tensor, classes: int, *, several: str = MULTILABEL) -> Tensor:
    """Returns the class numbers of one-hot targets ``(B, C, ...)``: one 1 along axis 1."""
    given = targets.double()
    binary = ((given == 0) | (given == 1)).all(dim=1)
    odd = ~(binary & (given.sum(dim=1) == 1))
    if bool(odd.any()):
        rows = rows_of(odd)
        got = shown(targets[rows[0]])
        expected = f"the number of one class, or one 1 among {classes} zeros"
        raise TargetFault(rows, got, expected, several)
    return given.argmax(dim=1)


def zeros_and_ones(targets: Tensor, options: TargetOptions, dtype: torch.dtype) -> Tensor:
    """Returns targets of 0 and 1 (and the ignored value) as floats of ``dtype``."""
    if targets.is_complex() or targets.is_quantized:
        raise TargetFault((0,), f"{targets.dtype}", "0 or 1", "give numbers 0 and 1")
    odd = ~((targets == 0) | (targets == 1))
    if options.ignore_index is not None:
        odd &= targets != options.ignore_index
    if bool(odd.any()):
        value = _first(targets, odd)
        remedy = "give 0 and 1"
        if value in ("-1", "-100", "255"):
            remedy += f", or set ignore_index={value} in the task if it marks what has no target"
        elif value == "2":
            remedy += "; if classes are numbered from 1, subtract 1"
        raise TargetFault(rows_of(odd), value, "0 or 1", remedy)
    return targets.to(dtype)


def rows_of(odd: Tensor) -> list[int]:
    """Returns the rows of a batch in which any element of a bool tensor ``(B, ...)`` is set."""
    return torch.nonzero(odd.reshape(len(odd), -1).any(dim=1)).flatten().tolist()


def shown(row: Tensor) -> str:
    """Returns one target as short text."""
    numbers = row.flatten()[:8].tolist()
    listed = ", ".join(f"{number:g}" for number in numbers)
    return f"[{listed}{', ...' if row.numel() > 8 else ''}]" if row.dim() else listed


def _first(targets: Tensor, odd: Tensor) -> str:
    return f"{targets[odd].flatten()[0].item():g}"
