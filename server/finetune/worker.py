"""Entry point of a distributed fine-tuning process.

In: a `Job`. Out: a ``.trained`` file per starting point, or an error file.
"""

from __future__ import annotations

import json
import os
import signal
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save

from fedcore.errors import FedcoreError, TrainingError
from fedcore.files import read_bytes, write_atomic, write_json
from fedcore.observability.events import nowhere
from fedcore.task.definition import data_folder, load_task
from fedcore.task.model import MAX_CHECKPOINT_BYTES, build_model, load_checkpoint
from server.cloud import read_cloud_data
from server.finetune.control import make_group
from server.finetune.curve import Curve
from server.finetune.failures import is_consequence, unknown_failure
from server.finetune.job import Job, remember_by_start, trained
from server.finetune.loop import train_start
from server.finetune.nodes import check_alike, share_weights, shared_place
from server.finetune.parallel import device_of, threads_of
from server.finetune.progress import TrainingProgress, appended_to
from server.finetune.sharding import whole_state
from server.process.parent import die_with_parent


def work(job: Job) -> None:
    """Runs a job; torchrun has set RANK, LOCAL_RANK and WORLD_SIZE.

    A failure is written to the job's error file. One that would come again ends all processes of
    this machine for good, without a restart.

    Raises:
        Exception: a failure after which torchrun should start the processes again.
    """
    die_with_parent()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})  # torchrun ends processes by it
    rank = int(os.environ["LOCAL_RANK"])
    lone = job.config.finetune.nodes == 1
    if _failed_for_good(job) and lone:
        return
    job.error_file(rank).unlink(missing_ok=True)  # of an attempt before a restart
    try:
        _train_all(job, rank)
    except KeyboardInterrupt:
        return  # asked to stop: a checkpoint is written
    except Exception as error:  # the task's code may raise anything
        known = isinstance(error, FedcoreError)
        message = str(error) if known else unknown_failure(rank, error)
        kind = type(error).__name__ if known else TrainingError.__name__
        final = not is_consequence(message)
        write_json(job.error_file(rank), {"type": kind, "message": message, "final": final})
        # Without GPUs, processes that wait for this one fail at once, so torchrun need not end and
        # start them again; with NCCL they would wait for long.
        under_agent = "TORCHELASTIC_RUN_ID" in os.environ
        if torch.cuda.is_available() or not (under_agent and lone and _failed_for_good(job)):
            raise
    finally:
        # Once the error is written: other processes fail, too, when the connections close.
        if dist.is_initialized():
            dist.destroy_process_group()


def _failed_for_good(job: Job) -> bool:
    """Returns whether a process of this machine has met an error that would come again."""
    return any(
        json.loads(path.read_text())["final"] for path in Path(job.folder).glob("error-*.json")
    )


def _train_all(job: Job, local_rank: int) -> None:
    run, world = job.config, int(os.environ["WORLD_SIZE"])
    device = device_of(local_rank)
    torch.set_num_threads(threads_of(int(os.environ.get("LOCAL_WORLD_SIZE", world))))
    task = load_task(run.path(run.task))
    settings = run.finetune
    cloud = read_cloud_data(
        task, data_folder(), holdout=settings.holdout, seed=run.seed, private=settings.private
    )
    assert cloud is not None  # the launcher has read it before
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        timeout=timedelta(seconds=run.finetune.timeout_s),
    )
    group = make_group(device)
    source = check_alike(group, run, joins=job.joins)
    remembered = remember_by_start(run, len(job.starts))
    emit = appended_to(job.progress_file) if group.rank == source else nowhere
    for number, (start, remember) in enumerate(zip(map(Path, job.starts), remembered, strict=True)):
        if group.least(int(trained(start).exists())):
            continue  # trained before processes were started again
        model = build_model(task, run)
        raw = read_bytes(start, max_bytes=MAX_CHECKPOINT_BYTES, what="a checkpoint")
        load_checkpoint(raw, model, where=str(start))
        model.to(device)
        share_weights(group, model, source=source)
        place = shared_place(group, job.places[number], source=source)
        train_start(
            model,
            task,
            cloud.of_tuning,
            run,
            device,
            remember=remember,
            group=group,
            unused=job.unused,
            place=place,
            stop=job.stop_file.exists,
            curve=Curve(job.curve_file(number)) if group.rank == source else None,
            on_part=TrainingProgress(emit, job.models[number], len(job.starts) - number - 1),
            note=partial(_note, job) if group.rank == source else None,
        )
        whole = save(whole_state(model))  # by every process, as the model may be divided
        if local_rank == 0:
            write_atomic(trained(start), whole)


def _note(job: Job, text: str) -> None:
    with job.notes_file.open("a") as stream:
        stream.write(text + "\n")
