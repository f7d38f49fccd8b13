"""Starts and stops the network: all servers on one event loop, the ServerApp in a thread.

`listen` opens both ports and yields a `Listening`; `run_beside` runs the rounds meanwhile.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
import signal
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeVar

from flwr.serverapp import Grid

from fedcore.crypto.roster import Roster, ServerIdentity
from fedcore.files import disk_errors
from fedcore.flower.fleet import Fleet
from fedcore.flower.fleet_grid import FleetGrid, ServerStopped
from fedcore.flower.identity import assume_identity
from fedcore.observability.foreign import foreign
from fedcore.rpc.hello import Hello
from fedcore.updates.seal import run_digest
from server.live.network.connections import Connections, grant_descriptors
from server.live.network.gate import Gate, Operate
from server.live.network.http import bind, http_server
from server.live.network.limits import Limits, PeerLog, Rates, Refusals, Uploads
from server.live.network.presence import Presence
from server.live.network.signatures import DevicePeers, SignatureChecks
from server.live.network.steady_clock import SteadyClock
from server.live.network.uvicorn_parts import HttpServer
from server.live.network.wake import Wakeups, disconnect_revoked, keep_room, serve_wakeups
from server.process.memory import return_freed_blocks
from server.process.signals import exit_immediately

log = logging.getLogger("fedcore.server")

_ENDING = (signal.SIGTERM, signal.SIGINT)
_SAME_SIGNAL_S = 1.0
"""Signals that arrive within so many seconds count as one."""
Result = TypeVar("Result")
_ROSTER_S = 1.0
"""Seconds between checks for revoked devices, and so the longest that one stays connected."""


@dataclass(frozen=True)
class Address:
    """Host and ports that a server listens on; port 0 lets the system choose."""

    host: str
    port: int
    wake_port: int

    def check_free(self) -> None:
        """Checks that both ports are available, by binding and releasing them.

        Raises:
            ResourceError: a port is in use, or may not be used.
        """
        with bind(self.host, self.port), bind(self.host, self.wake_port, option="--wake-port"):
            pass


@dataclass(frozen=True)
class Listening:
    """The parts of a network server that is up."""

    fleet: Fleet
    presence: Presence
    uploads: Uploads
    checks: SignatureChecks
    peers: DevicePeers
    address: Address
    """The bound address, with the ports that the system chose."""
    stopping: threading.Event
    """Set when the server stops; calls that wait on the grid then end."""
    interrupted: list[int] = field(default_factory=list)
    """Signals that asked this process to end, in order. Not an event: a handler may run inside
    another one, and an event's lock would then never be released."""

    def grid(self) -> FleetGrid:
        """Returns a Flower `Grid` for the open run."""
        return FleetGrid(
            self.fleet,
            self.presence,
            inspector=self.checks,
            consumed=self.uploads.released,
            stopping=self.stopping,
        )

    def stop(self) -> None:
        """Ends calls that wait on the grid, which then raise `ServerStopped`."""
        self.stopping.set()
        self.fleet.wake()


@asynccontextmanager
async def listen(
    identity: ServerIdentity,
    hello: Hello,
    address: Address,
    *,
    settings: Mapping[str, str],
    spool: Path,
    limits: Limits | None = None,
    operate: Operate | None = None,
) -> AsyncIterator[Listening]:
    """Serves a run on both ports until exit.

    Args:
        identity: The server's key, certificate and member list.
        hello: Versions that devices must have.
        address: Address to listen on.
        settings: The run's settings that are sent to devices.
        spool: Folder for uploads while they arrive; its contents are deleted.
        limits: Limits of the server; the defaults when None.
        operate: Handler for operators and viewers; None to reject them.

    Raises:
        ResourceError: a port is in use, or may not be used.
    """
    return_freed_blocks()
    limits, clock = limits or Limits(), SteadyClock()
    roster = identity.roster(clock=clock)
    fleet = Fleet(_emptied(spool))
    assume_identity(fleet.open_run(settings))
    presence, uploads = Presence(fleet.wake), Uploads(limits, fleet.abandon)
    refusals, lines = Refusals(), PeerLog()
    digest, key_of, now = run_digest(settings), fleet.key_of, clock.seconds
    checks = SignatureChecks(roster, key_of, run_id=digest, refusals=refusals, clock=now)
    max_connections = min(limits.connections, grant_descriptors())
    connections = Connections(
        limits, refusals, max_connections=max_connections, name_of=partial(_name, roster)
    )
    listener = connections.listener(bind(address.host, address.port))
    with _closed_on_error(listener):
        wakeups = Wakeups(presence, roster, uploads, refusals, lines=lines)
        wake, wake_port = await serve_wakeups(
            wakeups,
            identity,
            host=address.host,
            port=address.wake_port,
            connections=max_connections,
            handshake_s=limits.handshake_s,
        )
    gate = Gate(
        fleet=fleet,
        roster=roster,
        presence=presence,
        uploads=uploads,
        rates=Rates(limits, fleet.objects_sent),
        limits=limits,
        hello=hello,
        spool=spool,
        bodies=asyncio.Semaphore(limits.bodies),
        wake_port=wake_port,
        refusals=refusals,
        lines=lines,
        operate=operate,
    )
    http, peers = http_server(gate, identity, connections), DevicePeers(roster, key_of, refusals)
    bound = Address(address.host, listener.getsockname()[1], wake_port)
    listening = Listening(fleet, presence, uploads, checks, peers, bound, threading.Event())
    upkeep = _start_upkeep(wakeups, wake_port, connections, max_connections)
    serving = await _started(http, listener)
    log.info("listening on %s:%d, wakes on %d", bound.host, bound.port, bound.wake_port)
    try:
        yield listening
    finally:
        listening.stop()
        await _stopped(upkeep)
        http.should_exit = True
        presence.close()
        await wake.stop(grace=1.0)
        await serving
        fleet.end_run()
        shutil.rmtree(spool, ignore_errors=True)
        log.info("stopped")


def _emptied(spool: Path) -> Path:
    with disk_errors(spool):
        shutil.rmtree(spool, ignore_errors=True)
        spool.mkdir(parents=True, mode=0o700)
    return spool


def _start_upkeep(
    wakeups: Wakeups, wake_port: int, connections: Connections, max_connections: int
) -> asyncio.Future[tuple[None, None]]:
    """Starts what closes all that must not stay open, and logs what was left out; runs forever."""

    def summarise() -> None:
        wakeups.refusals.summarise()
        wakeups.lines.summarise()

    revoking = disconnect_revoked(
        wakeups.presence,
        wakeups.roster,
        wakeups.uploads,
        connections,
        summarise=summarise,
        every_s=_ROSTER_S,
    )
    keeping = keep_room(wakeups, wake_port, connections, max_connections)
    return asyncio.gather(revoking, keeping)


async def _stopped(upkeep: asyncio.Future[tuple[None, None]]) -> None:
    """Stops the upkeep, and logs why it had ended if it had."""
    upkeep.cancel()
    # Awaited, or asyncio logs a cancelled group as an error that nobody handled.
    (error,) = await asyncio.gather(upkeep, return_exceptions=True)
    if isinstance(error, Exception):
        log.error("the upkeep of connections ended early: %s", foreign(error, 200))


async def _started(http: HttpServer, listener: socket.socket) -> asyncio.Task[None]:
    """Starts ``http`` on a socket; returns its task once it is up or has failed."""
    serving = asyncio.create_task(http.serve(sockets=[listener]))
    while not http.started and not serving.done():
        await asyncio.sleep(0.01)
    if serving.done():
        await serving  # raises why it does not serve
    return serving


@contextmanager
def _closed_on_error(listener: socket.socket) -> Iterator[None]:
    try:
        yield
    except BaseException:
        listener.close()
        raise


def _name(roster: Roster, public: bytes) -> str | None:
    member = roster.member(public)
    return member.name if member is not None else None


async def run_beside(work: Callable[[Grid], Result], listening: Listening) -> Result | None:
    """Runs ``work``, a ServerApp, in a thread with the server's grid, and handles signals.

    SIGTERM or SIGINT stops ``work`` at its next call of the grid. A second signal, more than a
    second after the last, ends the process at once, as ``work`` may hang in a task's function.
    Signals within a second count as one: a terminal and a parent process may both send one.

    Once ``work`` has ended, signals have no effect until the process exits: they neither interrupt
    the shutdown nor change the exit code.

    Returns:
        The result of ``work``; None if it was stopped.

    Raises:
        FedcoreError: ``work`` raised it.
    """
    loop = asyncio.get_running_loop()
    signalled_s: float | None = None
    works = True

    def ignore() -> None:
        for each in _ENDING:  # a Python handler would be removed before the interpreter exits
            signal.signal(each, signal.SIG_IGN)

    def stop(number: int, frame: object) -> None:
        nonlocal signalled_s
        listening.interrupted.append(number)
        before_s, signalled_s = signalled_s, time.monotonic()
        if not works:
            ignore()
        elif before_s is not None and signalled_s - before_s > _SAME_SIGNAL_S:
            exit_immediately()
        with suppress(RuntimeError):  # the loop is closed: the server has stopped already
            loop.call_soon_threadsafe(listening.stop)

    for each in _ENDING:  # not the loop's handlers: they are removed with the loop
        signal.signal(each, stop)
    with ThreadPoolExecutor(1, thread_name_prefix="serverapp") as own:  # not the shared pool
        try:
            return await loop.run_in_executor(own, work, listening.grid())
        except ServerStopped:
            return None
        finally:
            works = False
            if signalled_s is not None:
                ignore()
