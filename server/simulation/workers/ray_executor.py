"""Executor with workers as actors of a Ray cluster, on this machine or on others."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import Any

import torch

from fedcore.errors import ConfigError, FedcoreError, RoundFailed
from fedcore.flower.identity import assume_identity
from server.process.memory import reuse_large_blocks
from server.rounds.aggregation.exact_mean import ExactMean
from server.simulation.virtual.nodes import RUN_ID
from server.simulation.workers.executor import MakeWorker, gathered, pieces
from server.simulation.workers.messages import ClientOutcome, ClientRef, RoundTask

ADDRESS = "RAY_ADDRESS"
"""Environment variable with the address of a running cluster. Without it, a cluster is started
on this machine, and stopped afterwards."""


class RayExecutor:
    """Executor with one Ray actor per worker; a task's content goes to each machine once.

    Actors load the task from its file. The cluster's machines need the file and the data under the
    same paths as this machine.
    """

    def __init__(self, make: MakeWorker, size: int) -> None:
        try:
            import ray
        except ImportError:
            raise ConfigError(
                "simulation.engine = 'ray': Ray is not installed. Nothing was trained; "
                "`pip install 'fedcore[sim]'`, or use 'local'."
            ) from None
        self._ray: Any = ray
        self._started = not ray.is_initialized()
        if self._started:
            os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
            ray.init(
                num_cpus=None if os.environ.get(ADDRESS) else size,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                configure_logging=False,
            )
        actor: Any = self._ray.remote(num_cpus=1)(_Actor)
        self._actors = [actor.remote(make) for _ in range(size)]

    @property
    def size(self) -> int:
        """Number of actors."""
        return len(self._actors)

    def run_task(
        self, order: RoundTask, clients: Sequence[ClientRef]
    ) -> tuple[list[ClientOutcome], ExactMean]:
        """Sends clients to actors in chunks; returns outcomes and the sum of folded updates.

        Raises:
            RoundFailed: an actor or its machine died, or had an error that is not a client's.
            FedcoreError: an actor raised it.
        """
        ray = self._ray
        shared = ray.put(order)
        waiting = list(pieces(order, clients, self.size))[::-1]
        try:
            ray.get([actor.start_task.remote(shared) for actor in self._actors])
            busy: dict[Any, Any] = {}
            for actor in self._actors:
                if waiting:
                    busy[actor.work.remote(waiting.pop())] = actor
            answers: list[ClientOutcome] = []
            while busy:
                (done, *_), _ = ray.wait(list(busy))
                actor = busy.pop(done)
                answers += ray.get(done)
                if waiting:
                    busy[actor.work.remote(waiting.pop())] = actor
            sums = ray.get([actor.partial_sum.remote() for actor in self._actors])
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, FedcoreError):
                raise error.cause from None
            raise RoundFailed(
                f"simulation: a Ray actor failed. The round was dropped. Its error: {error}"
            ) from None
        except ray.exceptions.RayError as error:
            raise RoundFailed(
                f"simulation: a Ray actor died: {error}. The round was dropped. `fedcore simulate "
                "--resume` (in Python resume=True) continues from the last checkpoint."
            ) from None
        return gathered(answers, sums, clients)

    def close(self) -> None:
        """Stops the actors, and the cluster if it was started here."""
        for actor in self._actors:
            self._ray.kill(actor)
        if self._started:
            self._ray.shutdown()


class _Actor:
    """One worker on a machine of the cluster."""

    def __init__(self, make: MakeWorker) -> None:
        torch.set_num_threads(1)
        reuse_large_blocks()
        assume_identity(RUN_ID)
        self._worker = make()

    def start_task(self, order: RoundTask) -> None:
        self._worker.start_task(order)

    def work(self, clients: Sequence[ClientRef]) -> list[ClientOutcome]:
        return self._worker.work(clients)

    def partial_sum(self) -> ExactMean:
        return self._worker.partial_sum()
