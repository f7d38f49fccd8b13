"""Which examples a process trains on, in which order, from any position of an epoch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fedcore.seeds import derive


@dataclass(frozen=True)
class Position:
    """How far training has come, independent of the number of processes."""

    epoch: int = 0
    """Complete passes over the data."""
    consumed: int = 0
    """Examples of the current pass that were trained on, over all processes."""
    step: int = 0
    """Steps of the optimiser so far."""
    rate_scale: float = 1.0
    """Factor of the learning rate, halved by each rollback."""
    rollbacks: int = 0
    """Returns to a checkpoint after a loss that was not finite."""


def rows_of_epoch(count: int, position: Position, *, seed: int, rank: int, world: int) -> Tensor:
    """Returns the rows that one process still trains on in an epoch, in their order.

    The order of an epoch is one permutation, dealt out to processes row by row. So the processes
    together take the same rows in a step, however many processes there are, if their number divides
    the batch. The first rows are repeated at the end where processes would get different numbers.

    Args:
        count: Number of examples.
        position: The epoch, and the examples of it that all processes have consumed.
        seed: The run's seed.
        rank: Rank of the process.
        world: Number of processes.

    Source:
        `torch.utils.data.DistributedSampler`, which gives the same rows from an epoch's beginning.
    """
    base = derive(seed, "fine-tuning order") % 2**31
    generator = torch.Generator().manual_seed(base + position.epoch)
    order = torch.randperm(count, generator=generator)
    left = order[position.consumed :]
    short = -len(left) % world
    if short:
        repeats = -(-short // count)
        left = torch.cat([left, order.repeat(repeats)[:short]])
    return left[rank::world]
