"""Reads rows of a data set in blocks of one form, whatever the rows are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Subset, TensorDataset, default_collate

from fedcore.errors import DataError
from fedcore.task.definition import Examples

_BLOCK_ROWS = 1024
_BLOCK_NUMBERS = 4 << 20  # 32 MiB as float64


@dataclass(frozen=True)
class RowBlock:
    """Rows that can be stacked: all inputs have one shape and dtype, and all targets."""

    rows: Sequence[int]
    inputs: Tensor
    targets: Tensor


@dataclass(frozen=True)
class BadRow:
    """A row that is not a pair of tensors, or raised an exception."""

    row: int
    kind: str
    got: str


def blocks(
    examples: Examples, rows: Sequence[int], *, more: Callable[[], bool] = lambda: True
) -> Iterator[RowBlock | BadRow]:
    """Yields the given rows in blocks, and those that cannot be used one by one.

    Args:
        examples: Any data set.
        rows: Row numbers.
        more: Asked before each block of a `TensorDataset` and each row of others; False ends it.
    """
    found = _tensors(examples, rows)
    if found is not None:
        yield from _cut(*found, rows, more)
        return
    pending: list[tuple[int, Tensor, Tensor]] = []
    for row in rows:
        if not more():
            break
        one = _example(examples, row)
        if isinstance(one, BadRow):
            yield one
            continue
        size = one[0].numel() * (len(pending) + 1)
        if pending and (_form(one) != _form(pending[0][1:]) or size > _BLOCK_NUMBERS):
            yield _stacked(pending)
            pending = []
        pending.append((row, *one))
        if len(pending) == _BLOCK_ROWS:
            yield _stacked(pending)
            pending = []
    if pending:
        yield _stacked(pending)


def _tensors(examples: Examples, rows: Sequence[int]) -> tuple[Tensor, Tensor, Any] | None:
    """Returns inputs, targets and an index of ``rows`` for a data set of two tensors; else None."""
    index: Any = rows
    while isinstance(examples, Subset):
        places = examples.indices
        index, examples = [places[row] for row in index], examples.dataset
    if not isinstance(examples, TensorDataset) or type(examples) is not TensorDataset:
        return None
    if len(examples.tensors) != 2:
        return None
    return (*examples.tensors, index)


def _cut(
    inputs: Tensor, targets: Tensor, index: Any, rows: Sequence[int], more: Callable[[], bool]
) -> Iterator[RowBlock]:
    each = max(1, min(_BLOCK_ROWS, _BLOCK_NUMBERS // max(1, inputs[:1].numel())))
    for first in range(0, len(rows), each):
        if not more():
            return
        some = index[first : first + each]
        places: Any = (
            slice(some.start, some.stop)
            if isinstance(some, range) and some.step == 1
            else torch.as_tensor(list(some), dtype=torch.long)
        )
        yield RowBlock(rows[first : first + each], inputs[places], targets[places])


def _example(examples: Examples, row: int) -> tuple[Tensor, Tensor] | BadRow:
    try:
        pair: Any = examples[row]
    except DataError as error:
        return BadRow(row, "inputs", str(error).removeprefix("data: ").rstrip("."))
    except (Exception, SystemExit) as error:  # the task's code may raise anything
        return BadRow(row, "unreadable", f"reading it failed: {type(error).__name__}: {error}")
    if not isinstance(pair, tuple | list) or len(pair) != 2:
        size = f" of {len(pair)}" if isinstance(pair, tuple | list) else ""
        return BadRow(row, "form", f"got a {type(pair).__name__}{size}")
    made = []
    for name, value in zip(("input", "target"), pair, strict=True):
        try:
            one = default_collate([value])
        except (RuntimeError, TypeError, ValueError):
            one = None
        if not isinstance(one, Tensor):
            shown = repr(value)
            shown = shown if len(shown) <= 40 else f"{shown[:40]}..."
            return BadRow(row, f"{name} type", f"its {name} is {type(value).__name__} {shown}")
        made.append(one[0])
    return made[0], made[1]


def _form(pair: tuple[Tensor, Tensor]) -> tuple[object, ...]:
    inputs, targets = pair
    return inputs.shape, inputs.dtype, targets.shape, targets.dtype


def _stacked(pending: Sequence[tuple[int, Tensor, Tensor]]) -> RowBlock:
    rows, inputs, targets = zip(*pending, strict=True)
    return RowBlock(rows, torch.stack(inputs), torch.stack(targets))
