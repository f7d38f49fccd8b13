"""Entry point of a distributed fine-tuning process.

In: a `Job`. Out: a ``.trained`` file per starting point, or an error file.
"""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from fedcore.errors import FedcoreError, TrainingError
from fedcore.files import read_bytes, write_atomic, write_json
from fedcore.task.definition import data_folder, load_task
from fedcore.task.model import MAX_CHECKPOINT_BYTES, build_model, checkpoint_bytes, load_checkpoint
from server.cloud import read_cloud_data
from server.finetune.job import Job, remember_by_start, trained
from server.finetune.loop import device_of, threads_of, train_start, unknown_failure
from server.process.parent import die_with_parent


def work(job: Job) -> None:
    """Runs a job; torchrun has set RANK, LOCAL_RANK and WORLD_SIZE.

    Raises:
        Exception: any failure, after writing it to the job's error file.
    """
    die_with_parent()
    rank = int(os.environ["LOCAL_RANK"])
    try:
        _train_all(job, rank)
    except Exception as error:  # the task's code may raise anything
        known = isinstance(error, FedcoreError)
        reason = {
            "type": type(error).__name__ if known else TrainingError.__name__,
            "message": str(error) if known else unknown_failure(rank, error),
        }
        write_json(job.error_file(rank), reason)
        raise
    finally:
        # Once the error is written: other processes fail, too, when the connections close.
        if dist.is_initialized():
            dist.destroy_process_group()


def _train_all(job: Job, rank: int) -> None:
    run, world = job.config, int(os.environ["WORLD_SIZE"])
    device = device_of(rank)
    torch.set_num_threads(threads_of(world))
    task = load_task(run.path(run.task))
    cloud = read_cloud_data(task, data_folder(), holdout=run.finetune.holdout, seed=run.seed)
    assert cloud is not None  # the launcher has read it before
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        timeout=timedelta(seconds=run.finetune.timeout_s),
    )
    remembered = remember_by_start(run, len(job.starts))
    for start, remember in zip(map(Path, job.starts), remembered, strict=True):
        model = build_model(task, run)
        raw = read_bytes(start, max_bytes=MAX_CHECKPOINT_BYTES, what="a checkpoint")
        load_checkpoint(raw, model, where=str(start))
        train_start(
            model.to(device),
            task,
            cloud.train,
            run,
            device,
            remember=remember,
            rank=dist.get_rank(),
            world=world,
            unused=job.unused,
        )
        if dist.get_rank() == 0:
            write_atomic(trained(start), checkpoint_bytes(model))
