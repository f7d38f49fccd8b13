"""Evaluation of the fine-tuned model on devices: serves both ports again until they report."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from flwr.serverapp import Grid

from fedcore.flower.identity import server_context
from fedcore.observability.events import Noted
from fedcore.task.model import FullModel
from fedcore.training.roles import evaluates
from server.live.deployment import LiveRun
from server.live.network.members import count_devices
from server.live.network.serve import listen, run_beside
from server.live.network.signatures import DevicePeers
from server.live.rounds.journaled import REJOIN_S
from server.rounds.evaluation.judgement import Judgement
from server.rounds.evaluation.judging import judging_app

_POLL_S = 0.2


@dataclass(frozen=True)
class JudgeOnDevices:
    """A `server.rounds.evaluation.judging.Judge` that has a run's devices evaluate two models.

    After the rounds, devices keep trying to reconnect, so they find the server again.
    """

    live: LiveRun

    def __call__(self, before: FullModel, after: FullModel) -> Judgement:
        """Returns the devices' metrics of the model ``before`` and ``after`` fine-tuning.

        Raises:
            RoundFailed: no device evaluated both models.
            ResourceError: a port is in use.
            KeyboardInterrupt: SIGTERM or SIGINT arrived.
        """
        live = self.live

        def work(peers: DevicePeers, grid: Grid) -> Judgement:
            found: list[Judgement] = []
            among = partial(evaluates, live.run.federation)
            most = count_devices(peers.roster, drained=live.control.drained, among=among)
            app = judging_app(
                live.inputs.task,
                live.run,
                (before, after),
                peers=peers,
                wait=partial(_wait, most=most),
                on_note=lambda text: live.emit(Noted(text)),
                on_end=found.append,
            )
            app(grid, server_context(grid.run.run_id))
            return found[0]

        interrupted: list[int] = []

        async def serve() -> Judgement | None:
            async with listen(
                live.identity, live.hello, live.address, settings=live.settings, spool=live.spool
            ) as listening:
                listening.presence.drain(live.control.drained)
                found = await run_beside(partial(work, listening.peers), listening)
            interrupted.extend(listening.interrupted)  # also while it closed
            return found

        kept = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            judgement = asyncio.run(serve())
        finally:
            for number, handler in kept.items():
                signal.signal(number, handler)
        if judgement is None or interrupted:
            raise KeyboardInterrupt
        return judgement


def _wait(connected: Callable[[], int], wanted: int, *, most: int) -> None:
    """Blocks until ``wanted`` devices have reconnected, or all, or for `REJOIN_S` seconds.

    Args:
        connected: Returns how many devices that evaluate are connected.
        wanted: How many should be.
        most: How many devices that evaluate the project has.
    """
    end = time.monotonic() + REJOIN_S
    while connected() < min(wanted, most) and time.monotonic() < end:
        time.sleep(_POLL_S)
