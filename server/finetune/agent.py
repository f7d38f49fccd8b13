"""Starts fine-tuning's processes by torchrun's elastic agent, and turns their failures into errors.

In: a `Job`. Out: nothing; results are files beside the job's starting points.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import threading
import time
import uuid
from _thread import interrupt_main
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, SignalException, Std
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous.api import RendezvousError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

import fedcore.errors as errors
from fedcore.config.finetune import Finetune
from fedcore.errors import ConfigError, FedcoreError, TrainingError
from server.finetune.job import Job
from server.finetune.meeting import apart, wait_for_host
from server.finetune.worker import work
from server.process.spawn import main_script_hidden

_LOGGERS = (
    "torch.distributed.elastic.multiprocessing.api",
    "torch.distributed.elastic.rendezvous.dynamic_rendezvous",
    "torch.distributed.elastic.agent.server.api",
    "torch.multiprocessing.spawn",
)
"""Loggers that print a traceback per failed or stopped process; the error file replaces them."""
_HANDLED = (signal.SIGTERM, signal.SIGHUP)
"""Signals that torchrun forwards to its processes before it ends."""
_LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
_OWN_STORE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
_LOOK_S = 0.5
_STOP_S = 25.0
"""How long processes may take to write a checkpoint once they are asked to stop."""


def launch(job: Job) -> None:
    """Runs a job in new processes on this machine, together with other nodes' if there are any.

    With checkpoints, Ctrl-C and SIGTERM ask the processes to write one first; a second signal ends
    them at once.

    Raises:
        FedcoreError: the first process that failed raised it.
        ConfigError: there are fewer GPUs than processes.
        TrainingError: a process ended without giving a reason, more often than
            ``finetune.max_restarts``; or nodes did not meet within ``finetune.rendezvous_s``.
        KeyboardInterrupt: Ctrl-C or SIGTERM ended the processes.
    """
    for old in Path(job.folder).glob("error-*.json"):  # of an earlier launch
        old.unlink()
    settings = job.config.finetune
    _check_gpus(settings.processes)
    gentle = any(place is not None for place in job.places)
    forwarded = _HANDLED[1:] if gentle else _HANDLED
    endpoint = settings.rendezvous if settings.nodes > 1 else None
    host = (endpoint or "localhost").rpartition(":")[0] or "localhost"
    if endpoint:
        wait_for_host(settings, hosts=not job.joins)
    config = LaunchConfig(
        min_nodes=settings.nodes,
        max_nodes=settings.nodes,
        nproc_per_node=settings.processes,
        run_id=f"fedcore-{job.config.name}" if endpoint else uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint=endpoint or "localhost:0",
        # On one machine, addresses that others learn are those of loopback.
        local_addr="localhost" if host in _LOOPBACK else None,
        rdzv_configs=_meeting(settings, hosts=not job.joins) if endpoint else {},
        start_method="spawn",
        max_restarts=settings.max_restarts,
        monitor_interval=0.05,
        signals_to_handle=",".join(number.name for number in forwarded),
        # Output of the processes would mix with the events of `--json`.
        logs_specs=DefaultLogsSpecs(log_dir=str(Path(job.folder) / "logs"), redirects=Std.ALL),
    )
    try:
        ask = job.stop_file.touch if gentle else None
        with _quiet(), _signals(ask), _new_store_each_time(), main_script_hidden():
            elastic_launch(config, work)(job)
    except ChildFailedError as failure:
        raise _reason(job, failure) from failure
    except SignalException as stopped:
        raise KeyboardInterrupt from stopped
    except RendezvousError as missed:
        raise apart(settings) from missed
    if error := _reported(job, range(settings.processes)):
        raise error
    if job.stop_file.exists():
        raise KeyboardInterrupt


def _meeting(settings: Finetune, *, hosts: bool) -> dict[str, Any]:
    """Returns who hosts torchrun's rendezvous, and how long it waits.

    A node that joins never hosts it, not even on the machine of the one that does, so that it can
    be lost and come back. A lost node is noticed within seconds.
    """
    seconds = settings.rendezvous_s
    return {
        "is_host": hosts,
        "timeout": seconds,
        "join_timeout": seconds,
        "read_timeout": max(1, round(seconds)),
        "keep_alive_interval": 2,
        "keep_alive_max_attempt": 3,
    }


def _check_gpus(processes: int) -> None:
    there = torch.cuda.device_count() if torch.cuda.is_available() else processes
    if processes > there:
        raise ConfigError(
            f"finetune.processes = {processes}: each process needs a GPU of its own, and there are "
            f"{there}. Nothing was trained; set at most {there}, or hide the GPUs "
            "(CUDA_VISIBLE_DEVICES='')."
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences torchrun's log of failures on standard error."""
    levels = {name: logging.getLogger(name).level for name in _LOGGERS}
    for name in _LOGGERS:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


@contextmanager
def _new_store_each_time() -> Iterator[None]:
    """Gives processes a new store whenever torchrun starts them.

    By default they use that of the agent, which keeps the addresses of processes that have died:
    after a restart, a process that is early tries those, and fails or waits for ever.
    """
    kept = os.environ.get(_OWN_STORE)
    os.environ[_OWN_STORE] = "1"
    try:
        yield
    finally:
        if kept is None:
            del os.environ[_OWN_STORE]
        else:
            os.environ[_OWN_STORE] = kept


@contextmanager
def _signals(ask: Callable[[], None] | None) -> Iterator[None]:
    """Hides Ctrl-C from processes started inside, and restores signal handlers afterwards.

    A terminal interrupts a program together with its children, and each child would print a
    traceback. Children inherit blocked signals, so SIGINT is blocked here, and a thread that waits
    for it interrupts the main thread.

    Args:
        ask: Asks the processes to stop. The first Ctrl-C or SIGTERM calls it, and the main thread
            is interrupted by the second, or when the processes take too long; None to interrupt it
            by the first Ctrl-C.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread handles signals, in torchrun too
        return
    handlers = {number: signal.getsignal(number) for number in _HANDLED}
    waited_for = {signal.SIGINT} if ask is None else {signal.SIGINT, signal.SIGTERM}
    handlers[signal.SIGINT] = signal.getsignal(signal.SIGINT)
    finished, asked_s = threading.Event(), list[float]()

    def came() -> None:
        if ask is None or asked_s:
            interrupt_main()
        else:
            asked_s.append(time.monotonic())
            ask()

    def watch() -> None:
        while True:
            got = signal.sigtimedwait(waited_for, _LOOK_S)
            if finished.is_set():
                return
            late = asked_s and time.monotonic() > asked_s[0] + _STOP_S
            if got is not None or late:
                came()

    def handle(number: int, frame: FrameType | None) -> None:
        # A thread that is older than the block got the signal.
        if asked_s:
            signal.default_int_handler(number, frame)
        came()

    if ask is not None:
        for each in waited_for:
            signal.signal(each, handle)
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, waited_for)
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        finished.set()
        signal.pthread_kill(watcher.ident or 0, signal.SIGINT)  # wakes only the watcher
        watcher.join()
        for number, handler in handlers.items():
            signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def _reported(job: Job, ranks: Iterable[int]) -> FedcoreError | None:
    """Returns the error in the processes' error files; None if there are no such files."""
    found = [json.loads(path.read_text()) for path in map(job.error_file, ranks) if path.exists()]
    if not found:
        return None
    cause = max(found, key=lambda one: one["final"])
    kind: type[FedcoreError] = getattr(errors, cause["type"])
    return kind(cause["message"])


def _reason(job: Job, failure: ChildFailedError) -> FedcoreError:
    """Returns the error of the first process that failed, as if it had been raised here."""
    _, first = failure.get_first_failure()
    ranks = sorted(failure.failures, key=lambda rank: rank != first.local_rank)
    return _reported(job, ranks) or TrainingError(
        f"fine-tuning: process {first.local_rank} ended with exit code {first.exitcode} without "
        "giving a reason. The federated model is kept; run again, and check for a lack of memory "
        "if it fails again."
    )
