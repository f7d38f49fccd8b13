"""One fine-tuning process: a DDP loop to be read in one sitting."""

from __future__ import annotations

import os
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DistributedSampler

from fedcore.errors import FedcoreError, TrainingError
from fedcore.files import read_bytes, write_atomic, write_json
from fedcore.observability.words import counted
from fedcore.seeds import derive
from fedcore.task.definition import Examples, Task, data_folder, load_task
from fedcore.task.model import MAX_CHECKPOINT_BYTES, build_model, checkpoint_bytes, load_checkpoint
from fedcore.training.batches import gather
from fedcore.training.local import check_loss, make_optimizer
from server.cloud import read_cloud_data
from server.finetune.job import Job, trained
from server.process.parent import die_with_parent


def work(job: Job) -> None:
    """Entry point of each process; torchrun has set RANK, LOCAL_RANK and WORLD_SIZE."""
    die_with_parent()
    rank = int(os.environ["LOCAL_RANK"])
    try:
        _train_all(job, rank)
    except Exception as error:  # the task's code runs here: its failure is passed on, not lost
        known = isinstance(error, FedcoreError)
        reason = {
            "type": type(error).__name__ if known else TrainingError.__name__,
            "message": str(error) if known else _unknown(rank, error),
        }
        write_json(job.error_file(rank), reason)
        raise


def _unknown(rank: int, error: Exception) -> str:
    return (
        f"fine-tuning: process {rank} failed: {type(error).__name__}: {error}. The federated model "
        "stands; mend the task, or set finetune.epochs to 0."
    )


def _train_all(job: Job, rank: int) -> None:
    run, world = job.config, int(os.environ["WORLD_SIZE"])
    device = torch.device("cuda", rank) if torch.cuda.is_available() else torch.device("cpu")
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // world))
    task = load_task(run.path(run.task))
    cloud = read_cloud_data(task, data_folder(), holdout=run.finetune.holdout, seed=run.seed)
    assert cloud is not None  # the launcher asked for it before it started anything
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        timeout=timedelta(seconds=run.finetune.timeout_s),
    )
    try:
        for start in map(Path, job.starts):
            model = build_model(task, run)
            raw = read_bytes(start, max_bytes=MAX_CHECKPOINT_BYTES, what="a checkpoint")
            load_checkpoint(raw, model, where=str(start))
            _train(model.to(device), task, cloud.train, job, device, world)
            if dist.get_rank() == 0:
                write_atomic(trained(start), checkpoint_bytes(model))
    finally:
        dist.destroy_process_group()


def _train(
    model: nn.Module,
    task: Task,
    examples: Examples,
    job: Job,
    device: torch.device,
    world: int,
) -> None:
    """Trains ``model`` in place; every process ends with the same weights."""
    run = job.config
    settings = run.finetune
    end = time.monotonic() + settings.timeout_s
    torch.manual_seed(derive(run.seed, "fine-tuning", dist.get_rank()))  # dropout; ours to seed
    parallel = DistributedDataParallel(
        model, device_ids=[device.index] if device.type == "cuda" else None
    )
    optimizer = make_optimizer(model, settings)
    sampler: DistributedSampler[int] = DistributedSampler(
        examples, seed=derive(run.seed, "fine-tuning order") % 2**31
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
