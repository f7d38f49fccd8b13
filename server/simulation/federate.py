"""Trains one model over virtual clients, with the ServerApp and ClientApp of a deployment."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from flwr.serverapp import ServerApp

from fedcore.client_app import client_app
from fedcore.config.owner import OwnerPolicy, tighten
from fedcore.config.run import RunConfig
from fedcore.flower.identity import SERVER_NODE_ID, assume_identity
from fedcore.flower.quiet import quiet
from fedcore.seeds import Simulated
from fedcore.task.definition import Task, load_task
from fedcore.training.client import Client
from fedcore.training.device import available
from fedcore.training.mods import client_mods
from server.process.memory import objects_frozen, reuse_large_blocks
from server.simulation.grid import SimulatedGrid
from server.simulation.virtual.devices import VirtualFleet
from server.simulation.virtual.nodes import RUN_ID, context_of, one_thread
from server.simulation.virtual.state import Choice, SimulationState
from server.simulation.workers.scheduler import WorkerScheduler
from server.simulation.workers.sharing import with_shared_frozen
from server.simulation.workers.worker import Worker


def federate(
    server: ServerApp,
    task: Task,
    run: RunConfig,
    owner: OwnerPolicy,
    clients: Sequence[str],
    *,
    state: SimulationState,
    fleet: VirtualFleet | None,
    on_choice: Callable[[Choice, int], None],
) -> None:
    """Runs ``server`` with one virtual node per client; nodes are in the order of ``clients``.

    Virtual clients run the same code as devices, see `fedcore.client_app`.

    Args:
        server: The ServerApp.
        task: Defines the model, the data and the metrics.
        run: Configuration of the run; its seed determines the result.
        owner: Policy that every virtual client complies with.
        clients: Names; read only for nodes that a message is sent to.
        state: State of the clients between rounds; updated in place.
        fleet: Devices of the clients on a virtual clock; None for a run without one.
        on_choice: Callback with the training method and the number of workers.
    """
    scheduler = WorkerScheduler(
        partial(_worker, with_shared_frozen(task, run), run, owner, fleet),
        partial(worker_elsewhere, run.path(run.task), run, owner, fleet),
        run.simulation,
        state=state,
        on_choice=on_choice,
        rounds=run.federation.rounds,
        gpus=torch.cuda.device_count() if _device(run, owner).type == "cuda" else 0,
    )
    first = run.federation.cohort if run.federation.over_selection > 1 else None
    grid = SimulatedGrid(clients, scheduler, state, first=first)
    assume_identity(RUN_ID)
    reuse_large_blocks()
    try:
        with one_thread(), objects_frozen():
            server(grid, context_of(SERVER_NODE_ID, "server"))
    finally:
        scheduler.close()


def _device(run: RunConfig, owner: OwnerPolicy) -> torch.device:
    return available(tighten(run, owner).client.device)


def _worker(task: Task, run: RunConfig, owner: OwnerPolicy, fleet: VirtualFleet | None) -> Worker:
    randomness = Simulated(run.seed)
    mods = client_mods(run.federation.strategy)
    skipped = dict[str, int]()

    def note(name: str, count: int) -> None:
        skipped[name] = count

    app = client_app(task, run, owner=owner, randomness=randomness, mods=mods, on_skipped=note)
    client = Client(task, tighten(run, owner), owner, randomness, on_skipped=note)
    return Worker(client, app, fleet, skipped)


def worker_elsewhere(
    path: Path, run: RunConfig, owner: OwnerPolicy, fleet: VirtualFleet | None
) -> Worker:
    """Creates a worker in a process that shares no memory with this one, from the task's file."""
    quiet()
    return _worker(load_task(path), run, owner, fleet)
