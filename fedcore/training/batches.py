"""Batches of a data set, in an order that a generator fixes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset, TensorDataset, default_collate

from fedcore.errors import DataError
from fedcore.task import Examples, size_of


def gather(examples: Examples, rows: Sequence[int] | Tensor) -> tuple[Tensor, Tensor]:
    """The examples of some rows as one batch.

    Raises:
        DataError: an example is no pair of tensors, or their shapes differ.
    """
    if isinstance(examples, TensorDataset):
        index = torch.as_tensor(rows, dtype=torch.long)
        inputs, targets = (tensor[index] for tensor in examples.tensors)
        return inputs, targets
    if isinstance(examples, Subset):
        indices = torch.as_tensor(examples.indices, dtype=torch.long)
        return gather(examples.dataset, indices[torch.as_tensor(rows, dtype=torch.long)])
    try:
        inputs, targets = default_collate([examples[int(row)] for row in rows])
    except (RuntimeError, TypeError, ValueError) as error:
        raise DataError(
            "data: the examples cannot be put into one batch; each must be a pair (input, target) "
            f"of tensors of one shape: {error}"
        ) from error
    return inputs, targets


def shuffled(
    examples: Examples, batch_size: int, rng: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch of batches; the last may be smaller."""
    order = torch.randperm(size_of(examples), generator=rng)
    for rows in torch.split(order, batch_size):
        yield gather(examples, rows)


def in_order(examples: Examples, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Every example once, in order."""
    for rows in torch.split(torch.arange(size_of(examples)), batch_size):
        yield gather(examples, rows)


def split(examples: Examples, holdout: float, seed: int) -> tuple[Examples, Examples]:
    """Splits off a random share, at least one example of each part where there are two.

    Returns:
        What stays, and what is held out (empty when ``holdout`` is 0).
    """
    count = size_of(examples)
    held = min(max(round(count * holdout), 1 if holdout else 0), max(count - 1, 0))
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    dataset: Dataset[tuple[Tensor, Tensor]] = examples
    return Subset(dataset, sorted(order[held:])), Subset(dataset, sorted(order[:held]))
