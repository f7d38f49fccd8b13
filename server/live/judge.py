"""Devices judge what came after the rounds: both ports are opened again until they have."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from flwr.serverapp import Grid

from fedcore.config.run import RunConfig
from fedcore.crypto.roster import ServerIdentity
from fedcore.flower.identity import server_context
from fedcore.observability.events import Noted, Sink
from fedcore.rpc.hello import Hello
from fedcore.task.definition import Task
from fedcore.task.model import FullModel
from server.live.network.serve import Address, listen, run_beside
from server.live.rounds.journaled import REJOIN_S
from server.rounds.checkpointing import Peers
from server.rounds.judging import Judgement, judging_app

_LOOK_S = 0.2


@dataclass(frozen=True)
class JudgeOnDevices:
    """A `server.rounds.judging.Judge` that asks the devices of a run how they measure two models.

    Devices that the rounds let go look for the server on and on, and find it again.
    """

    run: RunConfig
    task: Task
    identity: ServerIdentity
    hello: Hello
    address: Address
    settings: Mapping[str, str]
    """What devices were told of the run in its rounds."""
    spool: Path
    drained: Callable[[], Collection[str]]
    """Devices that are sent nothing, by name, as the operator says now."""
    emit: Sink

    def __call__(self, before: FullModel, after: FullModel) -> Judgement:
        """What they measure.

        Raises:
            RoundFailed: none measured both.
            ResourceError: a port is in use.
            KeyboardInterrupt: SIGTERM or SIGINT.
        """
        found: list[Judgement] = []

        def work(peers: Peers, grid: Grid) -> None:
            app = judging_app(
                self.task,
                self.run,
                (before, after),
                peers=peers,
                wait=_wait,
                on_note=lambda text: self.emit(Noted(text)),
                on_end=found.append,
            )
            app(grid, server_context(grid.run.run_id))

        async def serve() -> bool:
            async with listen(
                self.identity, self.hello, self.address, settings=self.settings, spool=self.spool
            ) as listening:
                listening.presence.drain(self.drained())
                return await run_beside(partial(work, listening.peers), listening)

        kept = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            if not asyncio.run(serve()):
                raise KeyboardInterrupt
        finally:
            for number, handler in kept.items():
                signal.signal(number, handler)
        return found[0]


def _wait(grid: Grid, wanted: int) -> None:
    """Until so many devices are back, or have had the time to be."""
    end = time.monotonic() + REJOIN_S
    while len(list(grid.get_node_ids())) < wanted and time.monotonic() < end:
        time.sleep(_LOOK_S)
