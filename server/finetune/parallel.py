"""Where processes compute, and how they share the gradients of a model."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fedcore.config.finetune import Finetune
from fedcore.seeds import kept_streams
from fedcore.task.definition import Examples, size_of
from fedcore.training.batches import gather
from server.finetune.control import Group
from server.finetune.sharding import estimate_memory, shard
from server.finetune.tensor_parallel import divide_matrices
from server.process.cores import usable_cores
from server.process.memory import return_freed_blocks

_TRIED_STEPS = 3


def device_of(rank: int) -> torch.device:
    """Returns the device of process ``rank``: its own GPU if there are any, else the CPU."""
    return torch.device("cuda", rank) if torch.cuda.is_available() else torch.device("cpu")


def threads_of(world: int) -> int:
    """Returns the number of threads per process when ``world`` processes share this machine.

    It is ``OMP_NUM_THREADS`` where that is set, and otherwise an equal share of the cores that this
    process may use: by its affinity, and by the quota of its container. More threads than cores
    wait for each other in every operation.
    """
    asked = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    if asked.isdecimal() and int(asked):
        return int(asked)
    return max(1, usable_cores() // world)


def leaves_unused(
    module: nn.Module,
    loss: Callable[[Any, Tensor], Tensor],
    examples: Examples,
    batch_size: int,
) -> bool:
    """Returns whether a parameter gets no gradient in one of the first steps; runs a copy.

    DDP needs to know: it waits for every gradient, unless it looks for unused parameters in each
    step, which takes time. Equal in all processes, as they try the same examples.
    """
    count = size_of(examples)
    try:
        copied = copy.deepcopy(module).train()
        trained = [parameter for parameter in copied.parameters() if parameter.requires_grad]
        device = trained[0].device
        with kept_streams():
            for first in range(_TRIED_STEPS):
                rows = [(first * batch_size + place) % count for place in range(max(2, batch_size))]
                inputs, targets = gather(examples, rows)
                torch.autograd.backward(loss(copied(inputs.to(device)), targets.to(device)))
                if any(parameter.grad is None for parameter in trained):
                    return True
                copied.zero_grad(set_to_none=True)
    except Exception:  # the task's code: training reports it
        return True
    return False


def distributed(
    module: nn.Module,
    settings: Finetune,
    group: Group,
    device: torch.device,
    *,
    unused: bool,
    note: Callable[[str], None],
) -> nn.Module:
    """Returns the module to call in place of ``module``, so that processes train it together.

    Under DDP each has a copy, and gradients are averaged. With tensor parallelism each has parts of
    the large matrices, and computes the whole batch. Under FSDP2 ``module`` itself is divided
    among them; ``finetune.shard`` and an estimate of memory decide. On CPUs, this process then
    returns large blocks of memory to the system as soon as they are freed, until it ends.

    Args:
        module: What is trained.
        settings: ``shard``, ``communication`` and the optimiser are used.
        group: The processes.
        device: The device of this process.
        unused: Whether a step may leave a parameter without a gradient.
        note: Receives the estimate where it leads to sharding.
    """
    if settings.shard == "tensor":
        divide_matrices(module, device, group.world)
        return module
    local_world = int(os.environ.get("LOCAL_WORLD_SIZE", group.world))
    estimate = estimate_memory(module, settings, device, world=group.world, local_world=local_world)
    asked = settings.shard == "always"
    divisible = settings.precision != "fp16" and settings.communication == "fp32"
    # One process may have more free memory than another: all must decide alike.
    too_large = (
        group.total(torch.tensor([float(not estimate.fits)], dtype=torch.float64)).item() > 0
    )
    if asked or (settings.shard == "auto" and divisible and too_large):
        note(f"Fine-tuning divides the model among {group.world} processes (FSDP2): {estimate}.")
        if device.type == "cpu":
            # Blocks are gathered and freed in turn; a heap that keeps them takes what is saved.
            return_freed_blocks()
        shard(module)
        return module
    if too_large:
        note(f"Fine-tuning may need more memory than there is: {estimate}.")
    parallel = DistributedDataParallel(
        module,
        device_ids=[device.index] if device.type == "cuda" else None,
        find_unused_parameters=unused,
    )
    if settings.communication != "fp32":
        from server.finetune.communication import compress_gradients

        compress_gradients(parallel, settings)
    return parallel


def synchronised(parallel: Any, last: bool) -> AbstractContextManager[None]:
    """Returns a context whose backward pass shares gradients only if ``last`` is True."""
    if isinstance(parallel, DistributedDataParallel):
        return nullcontext() if last else parallel.no_sync()
    if hasattr(parallel, "set_requires_gradient_sync"):
        parallel.set_requires_gradient_sync(last)
    return nullcontext()


@contextmanager
def compiled(module: nn.Module) -> Iterator[None]:
    """Compiles a module's forward pass in place, until the block ends."""
    module.compile()
    try:
        yield
    finally:
        module._compiled_call_impl = None
