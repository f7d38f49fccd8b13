"""Checks before training whether it fits into memory, and reports failed allocations."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from fedcore.config.run import ClientConfig, Privacy
from fedcore.errors import InsufficientMemory

_FLOAT_BYTES = 4
_SMALL_BYTES = 64 << 20  # less than this fits, else nothing would run at all


_PRIVATE_COPIES = 10
"""Private training's memory in float32 values per parameter: initial weights, the gradient, float64
sums and their scaled copy, one physical batch's sum, one example's gradient and its intermediates.
Larger physical batches use the separate budget of `fedcore.training.private.train_private`."""


def needed_bytes(model: nn.Module, client: ClientConfig, privacy: Privacy) -> int:
    """Returns the minimum memory of local training beyond the model, without activations.

    Counts gradients and optimiser state and, under example-level privacy, the buffers for summing
    clipped gradients. Batch size does not count: private training adapts its physical batch to
    memory.
    """
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    states = (1 if client.momentum else 0) if client.optimizer == "sgd" else 2
    copies = states + (_PRIVATE_COPIES if privacy.of_examples else 1)
    return copies * parameters * _FLOAT_BYTES


def free_bytes(device: torch.device) -> int | None:
    """Returns a device's free memory in bytes; None where the system doesn't report it."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def used_bytes(device: torch.device) -> int | None:
    """Returns the memory of this process; None where the system does not report it.

    On a GPU the most that tensors have taken at once, elsewhere what is resident.
    """
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")


def check_memory(
    model: nn.Module,
    client: ClientConfig,
    privacy: Privacy,
    device: torch.device,
    *,
    owner_limit_bytes: int | None,
) -> None:
    """Refuses training that cannot fit into memory.

    Raises:
        InsufficientMemory: Training needs more than is free, or than the device's owner allows.
    """
    needed = needed_bytes(model, client, privacy)
    limits = {"the owner's limit": owner_limit_bytes}
    if needed > _SMALL_BYTES:
        limits[f"free on {device}"] = free_bytes(device)
    for name, limit in limits.items():
        if limit is not None and needed > limit:
            raise InsufficientMemory(
                f"training needs at least {needed:,} bytes, but {name} is {limit:,} bytes. "
                "Nothing was trained; make the model smaller, or use a device with more memory."
            )


_SMALLER = "reduce client.batch_size or the size of the model"


@contextmanager
def memory_errors(what: str, *, remedy: str = _SMALLER) -> Iterator[None]:
    """Converts allocation failures within the context to `InsufficientMemory`.

    Args:
        what: The work, for the message.
        remedy: What needs less memory, in the imperative.
    """
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise _out_of_memory(what, error, remedy) from error
    except RuntimeError as error:
        if "allocate memory" not in str(error):
            raise
        raise _out_of_memory(what, error, remedy) from error


def _out_of_memory(what: str, error: Exception, remedy: str) -> InsufficientMemory:
    told = next(iter(str(error).splitlines()), type(error).__name__)  # MemoryError has no message
    return InsufficientMemory(f"{what}: memory ran out ({told}). The work was abandoned; {remedy}.")
