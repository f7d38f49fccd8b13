"""A rehearsal of distributed fine-tuning: one epoch of DDP on few examples, in forked processes.

Forked processes start in milliseconds and work for a task without a file. They have what a real
launch has: shards, gloo, and gradients averaged by DDP.
"""

from __future__ import annotations

import multiprocessing
import signal
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
import torch.distributed as dist

import fedcore.errors as errors
from fedcore.config.run import RunConfig
from fedcore.errors import FedcoreError, TrainingError
from fedcore.task.definition import Examples, Task
from fedcore.task.model import FullModel
from server.finetune.control import make_group
from server.finetune.failures import is_consequence, unknown_failure
from server.finetune.loop import train_start
from server.process.parent import die_with_parent
from server.process.signals import signals_blocked, unblock_signals
from server.process.spawn import main_script_hidden

_ALL_S = 120.0
_AFTER_FIRST_S = 2.0  # for others to fail by themselves once one has


def rehearse(
    task: Task, run: RunConfig, model: FullModel, examples: Examples, *, processes: int
) -> None:
    """Trains copies of the model by DDP in forked processes, on the CPU, and drops the result.

    Args:
        task: The task whose loss is minimised.
        run: ``[finetune]`` and the seed are used.
        model: The model to start from. Not changed.
        examples: The examples that the processes share.
        processes: Number of processes.

    Raises:
        FedcoreError: a process failed, or they took longer than two minutes.
    """
    context = multiprocessing.get_context("fork")
    started: list[tuple[BaseProcess, Connection]] = []
    with tempfile.TemporaryDirectory(prefix="fedcore-rehearse-") as folder:
        store = Path(folder) / "store"
        for rank in range(processes):
            here, there = context.Pipe(duplex=False)
            work = partial(_train, task, run, model, examples, store, rank, processes)
            process = context.Process(
                target=_serve, args=(there, work), name=f"fedcore-rehearsal-{rank}"
            )
            with signals_blocked(), main_script_hidden():
                process.start()
            there.close()
            started.append((process, here))
        try:
            failure = _wait(started)
        finally:
            for child, connection in started:
                child.kill()
                child.join()
                connection.close()
    if failure is not None:
        raise failure


def _wait(started: list[tuple[BaseProcess, Connection]]) -> FedcoreError | None:
    """Returns the first error of a process; None once all have finished."""
    end_s, left = time.monotonic() + _ALL_S, {connection for _, connection in started}
    first: FedcoreError | None = None
    while left:
        ready = wait(list(left), max(0.0, end_s - time.monotonic()))
        if not ready:
            return first or TrainingError(
                f"fine-tuning: {len(left)} of {len(started)} processes did not finish a few steps "
                f"within {_ALL_S:g} s. Look for a model or data set that waits for the others."
            )
        for connection in ready:
            assert isinstance(connection, Connection)
            left.discard(connection)
            found = _received(connection)
            if found is not None and first is None:
                first, end_s = found, time.monotonic() + _AFTER_FIRST_S
            elif found is not None and first is not None and is_consequence(str(first)):
                first = found
    return first


def _received(connection: Connection) -> FedcoreError | None:
    try:
        kind, message = connection.recv()
    except EOFError:
        return TrainingError(
            "fine-tuning: a process ended without giving a reason. Check for a lack of memory."
        )
    made: type[FedcoreError] = getattr(errors, kind) if kind else TrainingError
    return made(message) if kind else None


def _serve(connection: Connection, work: Callable[[], None]) -> None:
    """Runs in the child: sends the name and text of an error, or empty texts."""
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which ends this
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    unblock_signals()
    torch.set_num_threads(1)  # threads do not survive a fork
    kind = message = ""
    try:
        work()
    except FedcoreError as error:
        kind, message = type(error).__name__, str(error)
    except (Exception, SystemExit) as error:  # the task's code may raise anything
        kind, message = TrainingError.__name__, unknown_failure(0, error)
    connection.send((kind, message))
    connection.close()


def _train(
    task: Task,
    run: RunConfig,
    model: FullModel,
    examples: Examples,
    store: Path,
    rank: int,
    world: int,
) -> None:
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=_ALL_S),
    )
    device = torch.device("cpu")
    # Not destroyed after an error: that must be sent before the others see the connection close.
    train_start(
        model.cpu(),
        task,
        examples,
        run,
        device,
        remember=run.finetune.remember,
        group=make_group(device),
    )
    dist.destroy_process_group()
