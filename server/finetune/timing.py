"""Times a few steps of fine-tuning under other settings, in processes that are started for it.

In: a run whose task is in a file, a starting point, and settings to try. Out: a `Timed` for each.
Start with `timing_processes`. The processes stay for all attempts, as importing torch and reading
data takes longer than an attempt; after one that failed they are started anew.
"""

from __future__ import annotations

import multiprocessing
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

from fedcore.config.finetune import Finetune
from fedcore.config.run import RunConfig
from fedcore.errors import TrainingError
from fedcore.files import write_atomic
from fedcore.training.memory import free_bytes
from server.finetune.costs import Costs
from server.finetune.failures import is_consequence
from server.finetune.parallel import threads_of
from server.finetune.timing_process import Answer, Attempt, Observed, serve, status_bytes
from server.process.signals import signals_blocked
from server.process.spawn import main_script_hidden

_AFTER_LIMIT_S = 2.0  # for processes to end by themselves
_ENDED = "a process ended without giving a reason, perhaps for lack of memory"


@dataclass(frozen=True)
class Timed:
    """Speed and memory of some steps, without those that set up."""

    processes: int
    steps: int
    examples: int
    seconds: float
    """Time of the steps, the mean over processes."""
    busy_s: tuple[float, ...]
    """CPU time of each process in these steps."""
    peak_bytes: int
    """The most memory of all processes together: resident on CPUs, of tensors on GPUs."""
    fits: bool
    """Whether the system had that much free."""

    @property
    def examples_per_s(self) -> float:
        """Examples a second, over all processes."""
        return self.examples / self.seconds

    @property
    def step_s(self) -> float:
        """Time of a step."""
        return self.seconds / self.steps


@dataclass
class TimingProcesses:
    """Processes that have loaded a run's task and data, and time steps when asked."""

    run: RunConfig
    start: Path
    """Checkpoint to start from."""
    _started: list[tuple[BaseProcess, Connection]] = field(default_factory=list)

    def time(self, settings: Finetune, *, window_s: float, limit_s: float) -> Timed:
        """Times steps with other settings of ``[finetune]``.

        Args:
            settings: The settings; ``processes`` is used, and no checkpoint is written.
            window_s: How long steps are counted, unless one takes longer.
            limit_s: When the attempt is given up, with the start of processes it needs.

        Raises:
            TrainingError: no step could be counted, a process failed, or time ran out.
        """
        timed, _ = self._measure(settings, window_s, limit_s, costs=False)
        return timed

    def time_and_cost(
        self, settings: Finetune, *, window_s: float, limit_s: float
    ) -> tuple[Timed, Costs]:
        """Times steps like `time`, and measures what they cost; raises as `time`."""
        timed, seen = self._measure(settings, window_s, limit_s, costs=True)
        found = [one.costs for one in seen if one.costs is not None]
        joules = [one.energy_j for one in found]
        known = [each for each in joules if each is not None]
        # Packages are those of the whole machine, and GPUs each a worker's own.
        energy_j = sum(known) if torch.cuda.is_available() else max(known, default=None)
        peak = sum(one.peak_flops for one in found) / len(found)
        energy_j = energy_j if len(known) == len(joules) else None
        return timed, replace(found[0], peak_flops=peak, energy_j=energy_j)

    def _measure(
        self, settings: Finetune, window_s: float, limit_s: float, *, costs: bool
    ) -> tuple[Timed, list[Observed]]:
        began_s, world = time.monotonic(), settings.processes
        while len(self._started) < world:
            self._started.append(_start(self.run, self.start, len(self._started)))
        free = free_bytes(torch.device("cpu"))
        held = sum(status_bytes(process.pid or 0, "VmRSS") for process, _ in self._started)
        threads = threads_of(world) if world > 1 else torch.get_num_threads()
        with tempfile.TemporaryDirectory(prefix="fedcore-timing-") as folder:
            for rank, (_, connection) in enumerate(self._started[:world]):
                store = f"{folder}/store"
                attempt = Attempt(settings, rank, store, threads, window_s, limit_s, costs)
                with suppress(OSError):  # a process that has ended is noticed below
                    connection.send(attempt)
            seen = self._answers(world, began_s + limit_s + _AFTER_LIMIT_S)
        first, peak = seen[0], sum(one.peak_bytes for one in seen)
        on_gpu = torch.cuda.is_available()
        fits = on_gpu or free is None or peak <= free + held
        steps, examples = first.steps, first.examples
        return Timed(world, steps, examples, first.seconds, first.busy_s, peak, fits), seen

    def _answers(self, world: int, end_s: float) -> list[Observed]:
        """Returns what each process measured.

        Raises:
            TrainingError: a process could not, or they take too long.
        """
        waiting = {connection: rank for rank, (_, connection) in enumerate(self._started[:world])}
        seen, failed, ended = dict[int, Observed](), list[str](), False
        while waiting:
            left_s = end_s - time.monotonic()
            if failed and not is_consequence(failed[-1]):
                break
            ready = wait(list(waiting), max(0.0, left_s))
            if not ready:
                failed.append("no step was completed in time")
                break
            for connection in ready:
                assert isinstance(connection, Connection)
                rank = waiting.pop(connection)
                try:
                    answer: Answer = connection.recv()
                except (EOFError, OSError):
                    answer, ended = _ENDED, True
                if isinstance(answer, str):
                    failed.append(answer)
                else:
                    seen[rank] = answer
        if waiting or ended:
            self.close()
        if failed:
            raise TrainingError(next((one for one in failed if not is_consequence(one)), failed[0]))
        return [seen[rank] for rank in range(world)]

    def close(self) -> None:
        """Ends the processes; a later call of `time` starts new ones."""
        for process, connection in self._started:
            process.kill()
            process.join()
            connection.close()
        self._started = []


@contextmanager
def timing_processes(run: RunConfig, start: bytes) -> Iterator[TimingProcesses]:
    """Yields processes for timing, which start when they are needed and end with the block.

    Args:
        run: The run, whose task is in a file.
        start: Checkpoint that each attempt starts from.
    """
    with tempfile.TemporaryDirectory(prefix="fedcore-timing-") as folder:
        path = Path(folder) / "start.safetensors"
        write_atomic(path, start)
        processes = TimingProcesses(run, path)
        try:
            yield processes
        finally:
            processes.close()


def _start(run: RunConfig, start: Path, rank: int) -> tuple[BaseProcess, Connection]:
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    arguments = (there, run.model_dump_json(), str(run.base), str(start), rank)
    process = context.Process(target=serve, args=arguments, name=f"fedcore-timing-{rank}")
    with signals_blocked(), main_script_hidden():
        process.start()
    there.close()
    return process, here
