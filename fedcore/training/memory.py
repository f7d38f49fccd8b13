"""Whether training fits into memory, asked before it starts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from fedcore.config.run import ClientConfig, Privacy
from fedcore.errors import InsufficientMemory

_FLOAT_BYTES = 4
_SMALL_BYTES = 64 << 20  # what needs less fits, or nothing else would run either


_PRIVATE_COPIES = 10
"""Under privacy, in numbers for each parameter: weights at the start, the gradient, sums and their
scaled copy in float64, the sum of one physical batch, one example's gradient and what it is made
of. More examples at once take what `fedcore.training.private.train_private` is given for them."""


def needed_bytes(model: nn.Module, client: ClientConfig, privacy: Privacy) -> int:
    """The least that local training takes beyond the model, activations not counted.

    Gradients and the optimiser's state, and under privacy what a sum of clipped gradients needs.
    No batch size counts: private training takes as many examples at once as memory allows.
    """
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    states = {"adam": 2, "sgd": 1 if client.momentum else 0}[client.optimizer]
    copies = states + (_PRIVATE_COPIES if privacy.of_examples else 1)
    return copies * parameters * _FLOAT_BYTES


def free_bytes(device: torch.device) -> int | None:
    """Free memory of a device, or None where the system does not tell."""
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


def check_memory(
    model: nn.Module,
    client: ClientConfig,
    privacy: Privacy,
    device: torch.device,
    *,
    owner_limit_bytes: int | None,
) -> None:
    """Refuses training that cannot fit.

    Raises:
        InsufficientMemory: it needs more than is free, or than the device's owner allows.
    """
    needed = needed_bytes(model, client, privacy)
    limits = {"the owner's limit": owner_limit_bytes}
    if needed > _SMALL_BYTES:
        limits[f"free on {device}"] = free_bytes(device)
    for name, limit in limits.items():
        if limit is not None and needed > limit:
            raise InsufficientMemory(
                f"training needs at least {needed:,} bytes and {name} is "
                f"{limit:,} bytes. Nothing was trained; make the model smaller, or use "
                "a device with more memory."
            )


@contextmanager
def memory_errors(what: str) -> Iterator[None]:
    """Turns an allocation that failed after all into `InsufficientMemory`."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise _out_of_memory(what, error) from error
    except RuntimeError as error:
        if "allocate memory" not in str(error):
            raise
        raise _out_of_memory(what, error) from error


def _out_of_memory(what: str, error: Exception) -> InsufficientMemory:
    told = next(iter(str(error).splitlines()), type(error).__name__)  # Python's own says nothing
    return InsufficientMemory(
        f"{what}: memory ran out ({told}). The work was dropped; make client.batch_size or the "
        "model smaller."
    )
