"""Choice of training method and workers, made with the first training task."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from flwr.app import MessageType

from fedcore.config.simulated import Simulation
from fedcore.errors import ConfigError
from server.process.cores import usable_cores
from server.simulation.virtual.state import Choice, SimulationState
from server.simulation.workers.autotune import (
    Clock,
    attempts,
    choose,
    difference,
    forced,
    trial_budget_s,
)
from server.simulation.workers.executor import Executor, LocalExecutor, MakeWorker
from server.simulation.workers.messages import ClientRef, RoundTask
from server.simulation.workers.process_pool import ProcessPool

_WORTH_S = 0.02  # shorter rounds do not gain from more processes
_WRONG = 2.0  # a round that takes so many times the other method's time: the choice was wrong


class WorkerScheduler:
    """Chooses the training method and the number of workers once, and reuses both.

    ``make`` creates a worker in this process or a fork of it. ``make_elsewhere`` is picklable and
    creates one in a process that shares no memory with this one. ``rounds`` is the number of the
    run's rounds, and ``gpus`` that of GPUs to train on.
    """

    def __init__(
        self,
        make: MakeWorker,
        make_elsewhere: MakeWorker,
        settings: Simulation,
        *,
        state: SimulationState,
        on_choice: Callable[[Choice, int], None],
        rounds: int = 1,
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
        self._rounds = rounds
        self._recheck: bool | None = False if state.choice is None else None
        """Whether to measure again; None once it was, or where an earlier process chose."""

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
        if self._recheck:
            choice = self._choose_again(order, clients, choice)
        if self._executor is None:
            self._executor = self._start_executor(choice, len(clients))
            self._on_choice(choice, self._executor.size)
        return self._executor, replace(order, method=choice.method, chosen=True)

    def took(self, order: RoundTask, clients: int, seconds: float) -> None:
        """Compares what a task took with what the other training method was measured to take."""
        choice, executor = self._state.choice, self._executor
        if order.kind != MessageType.TRAIN or executor is None or choice is None or not clients:
            return
        other_s = choice.vectorised_s if choice.method == "loop" else choice.loop_s
        each_s = seconds * executor.size / clients
        if self._recheck is False and self._settings.training == "auto" and other_s is not None:
            self._recheck = each_s > _WRONG * other_s

    def _choose_again(
        self, order: RoundTask, clients: Sequence[ClientRef], choice: Choice
    ) -> Choice:
        """Measures both methods again, once in a run; returns the choice from now on."""
        self._recheck = None
        found = self._choose(order, clients)
        if found is None or found.method == choice.method:
            return choice
        self._state.choice = found
        if self._executor is not None:
            self._on_choice(found, self._executor.size)
        return found

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
        alone, loop_s = attempts(worker, order, active, clock=self._clock)
        train = [one.client for one in alone if one.content is not None]
        if not train:
            return None
        if wanted == "auto":
            rest = active[len(alone) :]
            trainings = self._rounds * len(clients)
            budget_s = trial_budget_s(loop_s, trainings=trainings) - loop_s * len(train)
            choice = choose(
                worker, order, [*train, *rest], loop_s=loop_s, budget_s=budget_s, clock=self._clock
            )
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
