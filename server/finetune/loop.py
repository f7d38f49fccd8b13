"""The loop of fine-tuning, to be read in one sitting: the same in one process as in several."""

from __future__ import annotations

import os
import time

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DistributedSampler

from fedcore.config.run import RunConfig
from fedcore.errors import TrainingError
from fedcore.observability.words import counted
from fedcore.seeds import derive
from fedcore.task.definition import Examples, Task
from fedcore.training.batches import gather
from fedcore.training.local import check_loss, make_optimizer


def device_of(rank: int) -> torch.device:
    """What process ``rank`` computes on: a GPU of its own where there are any."""
    return torch.device("cuda", rank) if torch.cuda.is_available() else torch.device("cpu")


def threads_of(world: int) -> int:
    """Threads of each of ``world`` processes, which share this machine's processors."""
    return max(1, (os.cpu_count() or 1) // world)


def unknown_failure(rank: int, error: BaseException) -> str:
    """What is said of an error that is none of ours: the task's code runs here."""
    return (
        f"fine-tuning: process {rank} failed: {type(error).__name__}: {error}. The federated model "
        "stands; mend the task, or set finetune.epochs to 0."
    )


def train_start(
    model: nn.Module,
    task: Task,
    examples: Examples,
    run: RunConfig,
    device: torch.device,
    *,
    rank: int = 0,
    world: int = 1,
) -> None:
    """Trains a model in place on the cloud's data.

    Torch's default generators are seeded and drawn from; whoever shares them keeps their state.

    Guarantee:
        Every process ends with the same weights, and the run's seed fixes all of their bits.

    Args:
        model: On ``device``; left in training mode.
        task: Whose loss is minimised.
        examples: All of them; process ``rank`` takes its share.
        run: ``[finetune]`` and the seed are read.
        device: Where to compute.
        rank: Of this process, from 0.
        world: Processes; above 1, their group has been initialised.

    Raises:
        TrainingDiverged: the loss is not finite.
        TrainingError: it took longer than ``finetune.timeout_s``.
    """
    settings = run.finetune
    end = time.monotonic() + settings.timeout_s
    torch.manual_seed(derive(run.seed, "fine-tuning", rank))  # dropout; ours to seed
    parallel = model
    if world > 1:
        parallel = DistributedDataParallel(
            model, device_ids=[device.index] if device.type == "cuda" else None
        )
    optimizer = make_optimizer(model, settings)
    sampler: DistributedSampler[int] = DistributedSampler(
        examples, world, rank, seed=derive(run.seed, "fine-tuning order") % 2**31
    )
    batch = max(1, settings.batch_size // world)
    model.train()
    for epoch in range(settings.epochs):
        sampler.set_epoch(epoch)
        total, count = torch.zeros((), device=device), 0
        for rows in torch.split(torch.tensor(list(sampler)), batch):
            if time.monotonic() > end:
                raise TrainingError(
                    f"fine-tuning: {epoch} of {counted(settings.epochs, 'epoch')} were done within "
                    f"finetune.timeout_s = {settings.timeout_s:g}. The federated model stands; "
                    "allow more time, or fewer epochs."
                )
            inputs, targets = gather(examples, rows)
            optimizer.zero_grad(set_to_none=True)
            loss = task.loss_of(parallel(inputs.to(device)), targets.to(device))
            torch.autograd.backward(loss)  # DDP averages gradients over processes here
            optimizer.step()
            total += loss.detach() * len(targets)
            count += len(targets)
        check_loss((total / count).item(), epoch=epoch, learning_rate=settings.learning_rate)
