"""The fine-tuning loop, identical for one process and for several."""

from __future__ import annotations

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
from fedcore.seeds import derive
from fedcore.task.definition import Examples, Task
from fedcore.training.batches import gather
from fedcore.training.distillation import beside_teacher
from fedcore.training.local import check_loss, clip_gradients, make_optimizer


def device_of(rank: int) -> torch.device:
    """Returns the device of process ``rank``: its own GPU if there are any, else the CPU."""
    return torch.device("cuda", rank) if torch.cuda.is_available() else torch.device("cpu")


def threads_of(world: int) -> int:
    """Returns the number of threads per process when ``world`` processes share this machine."""
    return max(1, (os.cpu_count() or 1) // world)


def unknown_failure(rank: int, error: BaseException) -> str:
    """Returns the message for an unexpected exception, usually from the task's code."""
    return (
        f"fine-tuning: process {rank} failed: {type(error).__name__}: {error}. The federated "
        "model is kept; correct the task, or set finetune.epochs to 0."
    )


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

    Raises:
        TrainingDiverged: the loss is not finite.
        TrainingError: training took longer than ``finetune.timeout_s``.
    """
    settings = run.finetune
    end = time.monotonic() + settings.timeout_s
    torch.manual_seed(derive(run.seed, "fine-tuning", rank))  # for dropout
    trained, loss_of = model, cast(Callable[[Any, Tensor], Tensor], task.loss_of)
    if remember:
        trained, loss_of = beside_teacher(model, model, task.loss_of, task.kind, weight=remember)
    parallel = trained
    if world > 1:
        parallel = DistributedDataParallel(
            trained, device_ids=[device.index] if device.type == "cuda" else None
        )
    optimizer = make_optimizer(model, settings)
    sampler: DistributedSampler[int] = DistributedSampler(
        examples, world, rank, seed=derive(run.seed, "fine-tuning order") % 2**31
    )
    batch = max(1, settings.batch_size // world)
    trained.train()
    for epoch in range(settings.epochs):
        sampler.set_epoch(epoch)
        total, count = torch.zeros((), device=device), 0
        for rows in torch.split(torch.tensor(list(sampler)), batch):
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
