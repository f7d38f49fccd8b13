"""Collates examples of a data set into batches, shuffled or in order, and splits off a holdout."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset, TensorDataset, default_collate

from fedcore.errors import DataError, FedcoreError
from fedcore.task.definition import Examples, size_of

_NO_BATCH = (
    "data: the examples cannot be collated into a batch; each must be a pair (input, target) of "
    "tensors of one shape"
)


class BatchReader(Dataset[tuple[Tensor, Tensor]], ABC):
    """A data set that reads many rows in one call."""

    @abstractmethod
    def rows(self, rows: Sequence[int] | Tensor) -> tuple[Tensor, Tensor]:
        """Returns the examples of the given rows as one batch."""


def gather(examples: Examples, rows: Sequence[int] | Tensor) -> tuple[Tensor, Tensor]:
    """Returns the examples of the given rows as one batch of inputs and one of targets.

    Raises:
        DataError: An example cannot be read, is no pair of tensors, or differs in shape from the
            others.
    """
    if isinstance(examples, TensorDataset):
        index = torch.as_tensor(rows, dtype=torch.long)
        inputs, targets = (tensor[index] for tensor in examples.tensors)
        return inputs, targets
    if isinstance(examples, BatchReader):
        return examples.rows(rows)
    if isinstance(examples, Subset):
        return gather(examples.dataset, [examples.indices[int(row)] for row in rows])
    found = [_example(examples, int(row)) for row in rows]
    _refuse_text(found, rows)
    try:
        inputs, targets = default_collate(found)
    except (RuntimeError, TypeError, ValueError) as error:
        raise DataError(f"{_NO_BATCH}: {error}") from error
    if not (isinstance(inputs, Tensor) and isinstance(targets, Tensor)):
        raise DataError(f"{_NO_BATCH}: got {type(found[0]).__name__}.")
    return inputs, targets


def _refuse_text(found: Sequence[object], rows: Sequence[int] | Tensor) -> None:
    """Refuses targets that are text, such as names of classes."""
    for place, example in enumerate(found):
        if isinstance(example, tuple) and len(example) == 2 and isinstance(example[1], str):
            raise DataError(
                f"data: row {int(rows[place])}: the target is the text {example[1]!r}, expected a "
                "number. These examples were not used; number the classes from 0, and give "
                "their names as `labels` of the task, in that order."
            )


def gather_all(examples: Examples) -> tuple[Tensor, Tensor]:
    """Returns all examples as one batch, without a copy for a `TensorDataset`."""
    if isinstance(examples, TensorDataset):
        inputs, targets = examples.tensors
        return inputs, targets
    return gather(examples, range(size_of(examples)))


def _example(examples: Examples, row: int) -> tuple[Tensor, Tensor]:
    try:
        return examples[row]
    except FedcoreError:
        raise
    except Exception as error:  # the data set is the user's code, and may read files lazily
        raise DataError(
            f"data: reading example {row} failed: {type(error).__name__}: {error}. This data was "
            "not used; fix the file or the task's data set."
        ) from error


def shuffled(
    examples: Examples, batch_size: int, rng: torch.Generator, *, least: int = 1
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields the batches of one epoch in an order drawn from ``rng``, see `batches_of`."""
    order = torch.randperm(size_of(examples), generator=rng)
    for rows in batches_of(order, batch_size, least=least):
        yield gather(examples, rows)


def batches_of(order: Tensor, batch_size: int, *, least: int = 1) -> list[Tensor]:
    """Returns the rows of each batch of an epoch.

    The last batch may be smaller. One of fewer than ``least`` rows joins the batch before.
    """
    parts = list(torch.split(order, batch_size))
    if len(parts) > 1 and len(parts[-1]) < least:
        last = parts.pop()
        parts[-1] = torch.cat([parts[-1], last])
    return parts


def passes(
    count: int,
    batch_size: int,
    rng: torch.Generator,
    *,
    epochs: int,
    steps: int | None = None,
    least: int = 1,
) -> Iterator[list[Tensor]]:
    """Yields for each pass over the data the rows of its batches, see `batches_of`.

    Args:
        count: Number of examples.
        batch_size: Examples per batch.
        rng: Generator for the order of examples, drawn when a pass begins.
        epochs: Number of passes.
        steps: Number of batches, in place of ``epochs``: the last pass may end early.
        least: Rows that a batch needs.
    """
    passed = taken = 0
    while passed < epochs if steps is None else taken < steps:
        batches = batches_of(torch.randperm(count, generator=rng), batch_size, least=least)
        if steps is not None:
            batches = batches[: steps - taken]
        yield batches
        passed, taken = passed + 1, taken + len(batches)


def in_order(examples: Examples, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields batches that cover every example once, in the data set's order."""
    for rows in torch.split(torch.arange(size_of(examples)), batch_size):
        yield gather(examples, rows)


def split(examples: Examples, holdout: float, seed: int) -> tuple[Examples, Examples]:
    """Splits off a random share of the examples, fixed by ``seed``.

    With two or more examples and ``holdout`` above 0, each part gets at least one.

    Returns:
        The examples to keep, and the holdout (empty when ``holdout`` is 0).
    """
    count = size_of(examples)
    held = min(max(round(count * holdout), 1 if holdout else 0), max(count - 1, 0))
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    dataset: Dataset[tuple[Tensor, Tensor]] = examples
    return Subset(dataset, sorted(order[held:])), Subset(dataset, sorted(order[:held]))
