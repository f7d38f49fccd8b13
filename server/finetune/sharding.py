"""Whether a model is copied to each process (DDP) or divided among them (FSDP2), and how."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedcore.config.finetune import Finetune
from fedcore.training.memory import free_bytes
from server.finetune.precision import blocks_of

_STATES = {"sgd": 1, "adam": 2, "adamw": 2}
_SHARE_OF_FREE = 0.7
"""The rest is left to activations, which depend on the batch."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Memory of weights, gradients and optimiser state; activations are not known beforehand."""

    needed_bytes: int
    """With a copy in each process."""
    free_bytes: int | None
    """What one process may use; None where the system does not say."""
    world: int

    @property
    def fits(self) -> bool:
        """Whether a copy of everything fits into the memory of each process."""
        return self.free_bytes is None or self.needed_bytes <= _SHARE_OF_FREE * self.free_bytes

    def __str__(self) -> str:
        free = "unknown" if self.free_bytes is None else f"{self.free_bytes / 2**20:.0f} MiB"
        return (
            f"weights, gradients and optimiser state take {self.needed_bytes / 2**20:.0f} MiB a "
            f"process under DDP, {self.needed_bytes / self.world / 2**20:.0f} MiB under FSDP2; "
            f"free are {free} a process"
        )


def estimate_memory(
    model: nn.Module, settings: Finetune, device: torch.device, *, world: int, local_world: int
) -> MemoryEstimate:
    """Returns how much memory training a model takes, and how much there is.

    Args:
        model: The model, with its teacher if it has one.
        settings: The optimiser.
        device: The device of this process.
        world: Number of processes.
        local_world: Number of processes that share this machine's memory; on GPUs each has its own.
    """
    states = _STATES[settings.optimizer]
    if settings.optimizer == "sgd" and not settings.momentum:
        states = 0
    needed = 0
    for parameter in model.parameters():
        copies = 2 + states if parameter.requires_grad else 1
        needed += copies * parameter.numel() * parameter.element_size()
    free = free_bytes(device)
    if free is not None and device.type == "cpu":
        free //= local_world
    return MemoryEstimate(needed, free, world)


def shard(model: nn.Module) -> None:
    """Divides a model's parameters among all processes, in place: FSDP2.

    Each block is gathered for its own computation, and released afterwards.
    """
    from torch.distributed.fsdp import fully_shard  # a second of imports

    for block in blocks_of(model):
        fully_shard(block)
    fully_shard(model)


def whole_state(model: nn.Module) -> dict[str, Tensor]:
    """Returns all weights and buffers undivided, on the CPU; every process must call this."""
    found = {}
    for name, tensor in model.state_dict().items():
        whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        found[name] = whole.detach().cpu().clone().contiguous()
    return found
