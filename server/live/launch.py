"""Starts a server for real devices from Python: `start_server`, which returns a `LiveServer`.

The server runs in a process of its own, ``fedcore server start``: it owns its process's signals and
TLS settings. Imports neither torch nor Flower.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from fedcore.background import Background, RunningCommand
from fedcore.config.settings import overrides_of, run_with
from fedcore.crypto.roster import check_server_folder
from fedcore.errors import ResourceError
from fedcore.observability.events import Event, event_of
from server.live.operators.server_client import ServerClient, ServerStatus

Place = str | PathLike[str]
_POLL_S = 0.2


@dataclass(frozen=True)
class LiveServer(RunningCommand):
    """A server that `fedcore.start_server` has started; used in a ``with`` block, it stops there.

    Example::

        with fedcore.start_server("churn/run.toml") as server:
            server.client.status().devices.there
            for event in server.events():  # until the run ends
                print(event)
            assert server.wait()
    """

    folder: Path
    """The run's folder, with ``global.safetensors`` once it is complete."""
    client: ServerClient
    """Pauses, stops, drains and inspects it."""

    def events(self) -> Iterator[Event]:
        """Yields the run's events from its start: those so far, then each that follows.

        Events are those of `fedcore.observability.events`, such as ``RoundFinished``. Ends with the
        server.
        """
        with self._process.output.open(errors="replace") as stream:
            line = ""
            while True:
                ended = not self.running  # before reading: then everything is read
                line += stream.readline()
                if line.endswith("\n"):
                    event = event_of(line)
                    if event is not None:
                        yield event
                    line = ""
                elif ended:
                    return
                else:
                    time.sleep(_POLL_S)


def start_server(
    run: Place,
    *,
    identity: Place = "authority/server",
    listen: str | None = None,
    wake_port: int | None = None,
    runs: Place = "runs",
    log: Place | None = None,
    resume: bool = False,
    fresh: bool = False,
    timeout_s: float = 300.0,
    **settings: Any,
) -> LiveServer:
    """Starts a server that trains over the devices that connect; returns once it listens.

    It runs in a process of its own, so that it works from a notebook and beside other servers, and
    ends with this one.

    Example::

        with fedcore.start_server("churn/run.toml", federation={"cohort": 3}) as server:
            devices = [fedcore.start_client(f"client-{i}", "churn/task.py") for i in (1, 2, 3)]
            complete = server.wait()

    Args:
        run: The run's file.
        identity: The server's folder, see `fedcore.Authority.add_server`.
        listen: Address for devices, ``HOST:PORT``; every address and the kits' port when None.
        wake_port: Port on which devices are woken; the next one when None.
        runs: Parent folder of the results.
        log: File for the log, rotated; a temporary one when None.
        resume: Continue an interrupted run, or start one if there is none.
        fresh: Start over, and discard an interrupted run.
        timeout_s: Seconds until it must listen; loading torch can take minutes the first time.
        settings: Sections or settings of the run to override.

    Returns:
        The server. It has ended already if the run that it should resume is complete.

    Raises:
        FedcoreError: the server could not start, with the error that it ended with.
        ResourceError: a server with this identity runs already, or it did not listen in time.
    """
    name, overrides = run_with(Path(run), settings).name, overrides_of(settings)
    check_server_folder(Path(identity))
    client = ServerClient(identity)
    if _status(client) is not None:
        raise ResourceError(
            f"{identity}: a server is running with this identity. Nothing was started; stop it "
            "with ServerClient.stop(), or start another with its own project and identity."
        )
    words = [Path(run), "--identity", identity, "--runs", runs, "--json"]
    for override in overrides:
        words += ["--set", override]
    for option, value in (("--listen", listen), ("--wake-port", wake_port), ("--log", log)):
        words += [] if value is None else [option, str(value)]
    words += ["--resume"] * resume + ["--fresh"] * fresh
    server = LiveServer(Path(runs) / name, client, _process=Background("server", "start", *words))
    deadline_s = time.monotonic() + timeout_s
    while server.running and _status(client) is None:
        if time.monotonic() > deadline_s:
            server.stop()
            raise ResourceError(
                f"{run}: the server did not listen within {timeout_s:g} s, and was stopped. Pass "
                f"a longer timeout_s; it logged: {server.log[-500:]}"
            )
        time.sleep(_POLL_S)
    if not server.running:
        server.wait()
    return server


def _status(client: ServerClient) -> ServerStatus | None:
    """Returns the state of the server; None if none answers."""
    try:
        return client.status()
    except ResourceError:
        return None
