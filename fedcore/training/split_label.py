"""Labels of how a client's examples are split into those to train on and those held back."""

from __future__ import annotations

import hashlib

import torch
from torch.utils import _pytree as trees
from torch.utils.data import Subset

from fedcore.task.definition import Examples, size_of
from fedcore.training.per_example.clipped_sum import read_batch

_LENGTH = 16  # hexadecimal digits
NOT_SPLIT = hashlib.sha256(b"all examples").hexdigest()[:_LENGTH]
"""Label for a client that holds back all of its data. No charge of training ever has it: where
clients hold back all or nothing, training is charged to all examples. So evaluations of such a
client add up with every charge of runs in which it trains."""


def split_label(examples: Examples, holdout: float, *, read: bool) -> str:
    """Returns a label that two splits have in common only if each example is in one part of both.

    A part is drawn by row number. So the label covers the number of rows, the share, and, with
    ``read``, the content of every row in order: of rows that have moved since, an example may have
    been in both parts.

    Args:
        examples: All examples, or a part of them, from `fedcore.training.client.local_data`.
        holdout: The share that is held back, above 0.
        read: Whether content counts; without it the caller knows that data do not change.
    """
    whole = examples.dataset if isinstance(examples, Subset) else examples
    count = size_of(whole)
    digest = hashlib.sha256(f"{count} {holdout!r}".encode())
    if read:
        cpu = torch.device("cpu")
        for batch in read_batch(whole, torch.arange(count), cpu, seed=0):
            parts = trees.tree_leaves((batch.inputs, batch.targets, batch.counted))
            for part in parts:
                digest.update(f"{part.dtype} {tuple(part.shape)} ".encode())
                digest.update(part.contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:_LENGTH]
