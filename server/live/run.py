"""A run over devices that connect: what ``fedcore server start`` does."""

from __future__ import annotations

import asyncio
import secrets
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TextIO

from flwr.app import Context, RecordDict
from flwr.serverapp import Grid

from fedcore.config import RunConfig
from fedcore.crypto.roster import ServerIdentity, load_server_identity
from fedcore.files import write_atomic
from fedcore.flower.identity import SERVER_NODE_ID
from fedcore.model import checkpoint_bytes
from fedcore.observability.console import choose
from fedcore.observability.events import Noted, RoundFinished, Sink, tee
from fedcore.observability.jsonl import json_lines
from fedcore.rpc.hello import hello_of
from fedcore.seeds import SystemEntropy
from fedcore.task import Task, data_folder, load_task
from server.app import Listener, Outcome, server_app
from server.cloud import read_cloud_data
from server.folder import open_folder
from server.live.serve import Address, listen, run_beside
from server.live.settings import device_settings


@dataclass(frozen=True)
class Deployment:
    """What an operator asks for."""

    run: RunConfig
    identity: Path
    host: str
    port: int | None
    """The one that the server's certificate was made with, when None."""
    wake_port: int | None
    """The one after ``port``, when None."""
    runs: Path
    json: bool

    def address(self, identity: ServerIdentity) -> Address:
        """Where to listen."""
        port = identity.port if self.port is None else self.port
        wake_port = (port + 1 if port else 0) if self.wake_port is None else self.wake_port
        return Address(self.host, port, wake_port)


def run_deployment(deployment: Deployment, out: TextIO) -> bool:
    """Serves until the run is over; False when it was stopped before.

    The best model lies in the run's folder as ``global.safetensors``.

    Raises:
        FedcoreError: whatever stops it.
    """
    run = deployment.run
    identity = load_server_identity(deployment.identity)
    path = run.path(run.task)
    task = load_task(path)
    with (
        open_folder(run, deployment.runs) as folder,
        json_lines(folder / "metrics.jsonl") as lines,
        choose(out, json=deployment.json) as shown,
    ):
        emit = tee(lines, shown)

        def work(grid: Grid) -> None:
            _federate(run, task, grid, folder, emit)

        async def serve() -> bool:
            instance = secrets.token_hex(8)
            hello = hello_of(task.name, path)
            address, settings = (
                deployment.address(identity),
                device_settings(run, instance=instance),
            )
            spool = folder / "incoming"
            async with listen(
                identity, hello, address, settings=settings, spool=spool
            ) as listening:
                return await run_beside(work, listening)

        return asyncio.run(serve())


def _federate(run: RunConfig, task: Task, grid: Grid, folder: Path, emit: Sink) -> None:
    cloud = read_cloud_data(task, data_folder(), holdout=run.finetune.holdout, seed=run.seed)

    def keep(outcome: Outcome) -> None:
        path = folder / "global.safetensors"
        write_atomic(path, checkpoint_bytes(outcome.model))
        emit(Noted(f"round {outcome.federated.best_round} is the best; its model is in {path}"))

    listener = Listener(
        on_note=lambda text: emit(Noted(text)),
        on_round=lambda record: emit(RoundFinished(asdict(record))),
        on_end=keep,
    )
    app = server_app(task, run, cloud=cloud, randomness=SystemEntropy(), listener=listener)
    context = Context(
        run_id=grid.run.run_id,
        node_id=SERVER_NODE_ID,
        node_config={},
        state=RecordDict(),
        run_config={},
    )
    app(grid, context)
