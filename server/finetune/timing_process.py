"""Entry point of a process that times steps of fine-tuning, see `server.finetune.timing`.

In: an `Attempt` at a time, over a pipe. Out: what was `Observed`, or the reason why nothing was.
"""

from __future__ import annotations

import gc
import os
import signal
import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import torch.distributed as dist

from fedcore.config.finetune import Finetune
from fedcore.config.run import RunConfig
from fedcore.errors import FedcoreError, TrainingError
from fedcore.seeds import kept_streams
from fedcore.task.definition import Task, data_folder, load_task
from fedcore.task.model import FullModel, build_model, load_checkpoint
from server.cloud import CloudData, read_cloud_data
from server.finetune.control import ALONE, Exchanged, Group, make_group
from server.finetune.costs import (
    Costs,
    EnergyMeter,
    all_reduce_s,
    flops_per_example,
    matrix_peak,
)
from server.finetune.curve import Curve
from server.finetune.failures import unknown_failure
from server.finetune.job import remember_by_start
from server.finetune.loop import train_start
from server.finetune.parallel import device_of
from server.finetune.progress import Extent
from server.process.parent import die_with_parent
from server.process.signals import unblock_signals

_TINY_RATE = 1e-12
"""Learning rate of attempts: the cost of a step, and weights that stay where they are."""
_MANY_EPOCHS = 10_000
_COUNTED_ROWS = 2  # examples whose operations are counted
_GRACE_S = 60.0  # after which training itself gives up, where `stop` was not asked


@dataclass(frozen=True)
class Attempt:
    """What a process is asked to time; plain values, so that it can be sent."""

    finetune: Finetune
    rank: int
    store: str
    """File at which the processes of the attempt meet."""
    threads: int
    window_s: float
    limit_s: float
    costs: bool
    """Whether to measure costs, too."""


@dataclass(frozen=True)
class Observed:
    """What a process has measured; of all processes together where it can know."""

    steps: int
    examples: int
    seconds: float
    busy_s: tuple[float, ...]
    peak_bytes: int
    """Of this process alone."""
    costs: Costs | None


Answer = Observed | str
"""What a process sends: measurements, or the reason why there are none."""


def serve(connection: Connection, run: str, base: str, start: str, rank: int) -> None:
    """Loads task and data once, then times what it is asked to, until the pipe closes.

    Args:
        connection: The pipe.
        run: The run's configuration as JSON.
        base: Base folder of its relative paths.
        start: Checkpoint to start from.
        rank: Number of the process.
    """
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which ends this
    unblock_signals()
    nothing = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):  # output of the task would mix with that of the parent
        os.dup2(nothing, stream)
    config = RunConfig.model_validate_json(run).model_copy(update={"base": Path(base)})
    loaded: tuple[Task, CloudData] | None = None
    with suppress(EOFError):
        while True:
            attempt: Attempt = connection.recv()
            try:
                loaded = loaded or _load(config)
                answer: Answer = _Timing(config, *loaded, Path(start), attempt).seen()
            except FedcoreError as error:
                answer = str(error)
            except (Exception, SystemExit) as error:  # the task's code may raise anything
                answer = unknown_failure(rank, error)
            gc.collect()
            connection.send(answer)


def _load(run: RunConfig) -> tuple[Task, CloudData]:
    task = load_task(run.path(run.task))
    cloud = read_cloud_data(task, data_folder(), holdout=run.finetune.holdout, seed=run.seed)
    assert cloud is not None  # the parent has read it before
    return task, cloud


class _Timing:
    """Trains until enough steps are counted: all after the first exchange between processes."""

    def __init__(
        self, run: RunConfig, task: Task, cloud: CloudData, start: Path, attempt: Attempt
    ) -> None:
        changed = {
            "learning_rate": _TINY_RATE,
            "epochs": _MANY_EPOCHS,
            "timeout_s": attempt.limit_s + _GRACE_S,
            "checkpoints": None,
        }
        self._run = run.model_copy(update={"finetune": attempt.finetune.model_copy(update=changed)})
        self._task, self._cloud, self._start, self._attempt = task, cloud, start, attempt
        self._device, self._curve = device_of(attempt.rank), Curve()
        self._meter = EnergyMeter(self._device)
        self._tokens: int | None = None
        self._began_s = time.monotonic()
        self._counted_from_s: float | None = None

    def seen(self) -> Observed:
        """Trains, and returns what was measured.

        Raises:
            TrainingError: no step could be counted.
        """
        torch.set_num_threads(self._attempt.threads)
        _reset_peak(self._device)
        group = self._join()
        try:
            with kept_streams():
                model = build_model(self._task, self._run)
                load_checkpoint(self._start.read_bytes(), model, where=str(self._start))
                self._train(model.to(self._device), group)
                energy_j, peak = self._meter.joules(), _peak(self._device)
                costs = self._costs(model, group, energy_j) if self._attempt.costs else None
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
        counted = self._curve.parts[1:]
        if not counted:
            limit_s = self._attempt.limit_s
            raise TrainingError(f"no second step was completed within {limit_s:.0f} s")
        return Observed(
            steps=sum(len(part.losses) for part in counted),
            examples=sum(part.examples for part in counted),
            seconds=sum(part.seconds for part in counted),
            busy_s=tuple(map(sum, zip(*(part.busy_s for part in counted), strict=True))),
            peak_bytes=peak,
            costs=costs,
        )

    def _join(self) -> Group:
        attempt, world = self._attempt, self._attempt.finetune.processes
        if world == 1:
            return ALONE
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)
        dist.init_process_group(
            "nccl" if self._device.type == "cuda" else "gloo",
            init_method=f"file://{attempt.store}",
            rank=attempt.rank,
            world_size=world,
            timeout=timedelta(seconds=attempt.limit_s),
        )
        return make_group(self._device)

    def _train(self, model: FullModel, group: Group) -> None:
        with suppress(KeyboardInterrupt):  # by `_stop`
            train_start(
                model,
                self._task,
                self._cloud.train,
                self._run,
                self._device,
                remember=remember_by_start(self._run, 1)[0],
                group=group,
                stop=self._stop,
                curve=self._curve,
                on_part=self._on_part,
            )

    def _on_part(self, part: Exchanged, extent: Extent) -> None:
        if self._counted_from_s is None:
            self._counted_from_s, self._tokens = time.monotonic(), extent.tokens_per_example
            self._meter.start()

    def _stop(self) -> bool:
        now_s, from_s = time.monotonic(), self._counted_from_s
        enough = from_s is not None and now_s - from_s >= self._attempt.window_s
        return enough or now_s - self._began_s > self._attempt.limit_s

    def _costs(self, model: FullModel, group: Group, energy_j: float | None) -> Costs:
        trained = [each for each in model.parameters() if each.requires_grad]
        parameters = sum(each.numel() for each in trained)
        try:
            flops: float | None = flops_per_example(
                model, self._task.loss_of, self._cloud.train, self._device, rows=_COUNTED_ROWS
            )
        except Exception:  # the task's code, or an operation that torch cannot count
            flops = None
        group.agreed(0)  # all of them are ready
        dtype = torch.bfloat16 if self._run.finetune.precision == "bf16" else torch.float32
        return Costs(
            parameters=parameters,
            flops_per_example=flops,
            tokens_per_example=self._tokens,
            peak_flops=matrix_peak(self._device, dtype),
            all_reduce_s=all_reduce_s(parameters, self._device) if group.world > 1 else None,
            energy_j=energy_j,
        )


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with suppress(OSError):  # the peak is then that of the process's life
        Path("/proc/self/clear_refs").write_text("5")


def _peak(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return status_bytes(os.getpid(), "VmHWM")


def status_bytes(pid: int, name: str) -> int:
    """Returns a figure of a process's memory; 0 where the system does not say."""
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    return 0
