"""Choice of training method and workers, made with the first training task."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from flwr.app import MessageType

from fedcore.config.run import Simulation
from fedcore.errors import ConfigError
from server.process.cores import usable_cores
from server.simulation.virtual.state import Choice, SimulationState
from server.simulation.workers.autotune import Clock, attempts, choose, difference, forced
from server.simulation.workers.executor import Executor, LocalExecutor, MakeWorker
from server.simulation.workers.messages import ClientRef, RoundTask
from server.simulation.workers.process_pool import ProcessPool

_WORTH_S = 0.02  # shorter rounds do not gain from more processes


class WorkerScheduler:
    """Chooses the training method and the number of workers once, and reuses both.

    ``make`` creates a worker in this process or a fork of it. ``make_elsewhere`` is picklable and
    creates one in a process that shares no memory with this one. ``gpus`` is the number of GPUs to
    train on.
    """

    def __init__(
        self,
        make: MakeWorker,
        make_elsewhere: MakeWorker,
        settings: Simulation,
        *,
        state: SimulationState,
        on_choice: Callable[[Choice, int], None],
        gpus: int = 0,
        clock: Clock = time.perf_counter,
    ) -> None:
        self._make = make
        self._make_elsewhere = make_elsewhere
        self._settings = settings
        self._on_choice = on_choice
        self._gpus = gpus
        self._clock = clock
        self._here = LocalExecutor(make())
        self._executor: Executor | None = None
        self._state = state

    def executor_for(
        self, order: RoundTask, clients: Sequence[ClientRef]
    ) -> tuple[Executor, RoundTask]:
        """Returns the executor for a task, and the task with its training method set."""
        if order.kind != MessageType.TRAIN:
            return self._executor or self._here, order
        choice = self._state.choice
        if choice is None:
            choice = self._state.choice = self._choose(order, clients)
        if choice is None:
            return self._here, order
        if self._executor is None:
            self._executor = self._start_executor(choice, len(clients))
            self._on_choice(choice, self._executor.size)
        return self._executor, replace(order, method=choice.method, chosen=True)

    def close(self) -> None:
        """Stops the workers."""
        if self._executor is not None:
            self._executor.close()

    def _choose(self, order: RoundTask, clients: Sequence[ClientRef]) -> Choice | None:
        """Chooses the training method; None where no client trained, so that none was measured."""
        wanted, worker = self._settings.training, self._here.worker
        if wanted == "loop":
            return forced(wanted)
        active = worker.clients_in_time(order, clients)
        alone = attempts(worker, order, active, clock=self._clock)
        train = [one.client for one in alone if one.content is not None]
        if not train:
            return None
        if wanted == "auto":
            rest = active[len(alone) :]
            choice = choose(worker, order, [*train, *rest], clock=self._clock)
        else:
            choice = forced(wanted)
        if choice.method == "loop":
            return choice
        why = difference(worker, order, alone)
        if why is not None and wanted == "vectorised":
            raise ConfigError(
                f"simulation.training = 'vectorised': {why}. Nothing was trained; use 'loop'."
            )
        return choice if why is None else replace(choice, method="loop", reason=why)

    def _start_executor(self, choice: Choice, cohort: int) -> Executor:
        if self._settings.engine == "ray":
            from server.simulation.workers.ray_executor import RayExecutor

            return RayExecutor(self._make_elsewhere, self._settings.workers or usable_cores())
        workers = self._settings.workers
        if self._gpus:  # a single process uses a GPU best
            workers = workers or self._gpus
            return self._here if workers == 1 else self._pool(self._make_elsewhere, workers)
        if not workers:
            taken_s = choice.loop_s if choice.method == "loop" else choice.vectorised_s
            small = taken_s is not None and taken_s * cohort < _WORTH_S
            workers = 1 if small else usable_cores()
        workers = min(workers, cohort)
        return self._here if workers == 1 else self._pool(self._make, workers)

    def _pool(self, make: MakeWorker, workers: int) -> Executor:
        return ProcessPool(make, workers, gpus=self._gpus)
