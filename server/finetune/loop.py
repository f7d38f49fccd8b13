"""The fine-tuning loop, identical for one process and for several."""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DistributedSampler

from fedcore.config.run import RunConfig
from fedcore.errors import TrainingError
from fedcore.observability.words import counted
from fedcore.seeds import derive, kept_streams
from fedcore.task.definition import Examples, Task, size_of
from fedcore.training.batches import batches_of, gather
from fedcore.training.distillation import beside_teacher
from fedcore.training.local import check_loss, clip_gradients, make_optimizer
from fedcore.training.lone_rows import least_rows, use_running_statistics
from server.process.cores import usable_cores

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


def unknown_failure(rank: int, error: BaseException) -> str:
    """Returns the message for an unexpected exception, usually from the task's code."""
    return (
        f"fine-tuning: process {rank} failed: {type(error).__name__}: {error}. The federated "
        "model is kept; correct the task, or set finetune.epochs to 0."
    )


def is_consequence(message: str) -> bool:
    """Returns whether a process failed only because it lost the connection to another one.

    A process that fails closes its connections before its own error is read, so the error of a
    process that waited for it can arrive first.
    """
    return "gloo/transport" in message or "DistBackendError" in message


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


def train_start(
    model: nn.Module,
    task: Task,
    examples: Examples,
    run: RunConfig,
    device: torch.device,
    *,
    remember: float,
    rank: int = 0,
    world: int = 1,
    unused: bool = False,
) -> None:
    """Trains a model in place on the cloud's data.

    Seeds and advances torch's default generators; the caller saves their state if needed.

    Guarantee:
        Every process ends with equal weights, and the run's seed determines all of their bits.

    Args:
        model: The model, on ``device``; left in training mode.
        task: The task whose loss is minimised.
        examples: All training examples; process ``rank`` trains on its share.
        run: ``[finetune]`` and the seed are used.
        device: The device to compute on.
        remember: Weight of the answers that the model gives before training, see
            `fedcore.training.distillation`; 0 to train on the labels alone.
        rank: Rank of this process, from 0.
        world: Number of processes; if above 1, their process group must be initialised.
        unused: Whether some step may leave a parameter without a gradient; tried if not known.

    Raises:
        TrainingDiverged: the loss is not finite.
        TrainingError: training took longer than ``finetune.timeout_s``.
        DataError: there is one example for each process, and a layer needs two.
    """
    settings = run.finetune
    end = time.monotonic() + settings.timeout_s
    torch.manual_seed(derive(run.seed, "fine-tuning", rank))  # for dropout
    trained, loss_of = model, cast(Callable[[Any, Tensor], Tensor], task.loss_of)
    if remember:
        trained, loss_of = beside_teacher(model, model, task.loss_of, task.problem, weight=remember)
    parallel = trained
    batch = max(1, settings.batch_size // world)
    if world > 1:
        parallel = DistributedDataParallel(
            trained,
            device_ids=[device.index] if device.type == "cuda" else None,
            find_unused_parameters=unused or leaves_unused(trained, loss_of, examples, batch),
        )
    optimizer = make_optimizer(model, settings)
    sampler: DistributedSampler[int] = DistributedSampler(
        examples, world, rank, seed=derive(run.seed, "fine-tuning order") % 2**31
    )
    share = len(sampler)
    least = least_rows(trained, loss_of, examples, count=share, batch_size=batch)
    trained.train()
    if share < least:
        use_running_statistics(trained)
    for epoch in range(settings.epochs):
        sampler.set_epoch(epoch)
        total, count = torch.zeros((), device=device), 0
        for rows in batches_of(torch.tensor(list(sampler)), batch, least=least):
            if time.monotonic() > end:
                raise TrainingError(
                    f"fine-tuning: {epoch} of {counted(settings.epochs, 'epoch')} were completed "
                    f"within finetune.timeout_s = {settings.timeout_s:g}. The federated model is "
                    "kept; allow more time, or set fewer epochs."
                )
            inputs, targets = gather(examples, rows)
            optimizer.zero_grad(set_to_none=True)
            loss = loss_of(parallel(inputs.to(device)), targets.to(device))
            torch.autograd.backward(loss)  # DDP averages gradients over processes here
            clip_gradients(model, settings)
            optimizer.step()
            total += loss.detach() * len(targets)
            count += len(targets)
        check_loss((total / count).item(), epoch=epoch, learning_rate=settings.learning_rate)
