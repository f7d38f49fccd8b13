"""Runs the delivery service: on the current event loop, or beside other work in a thread."""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc

from fedcore.crypto.roster import ServerIdentity
from fedcore.errors import ConfigError, ResourceError
from fedcore.rpc.crowd import SWEEP_S, Crowd
from fedcore.rpc.delivery import MAX_REQUEST_BYTES, PORT_OFFSET
from server.delivery.files import PublishedFiles
from server.delivery.service import Deliveries, OnReport
from server.delivery.watchers import Watchers
from server.process.loop_thread import served_in_thread

log = logging.getLogger("fedcore.server")

_PING_S, _PONG_S = 30, 60
"""Keepalive interval and timeout: a ping waits behind the data of a slow link."""
_CONNECTIONS = 4096
"""Most connections; a quarter of them may be without a call, see `Crowd`."""
_OPTIONS = (
    ("grpc.keepalive_time_ms", _PING_S * 1000),
    ("grpc.keepalive_timeout_ms", _PONG_S * 1000),
    ("grpc.http2.ping_timeout_ms", _PONG_S * 1000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 5000),
    ("grpc.max_receive_message_length", MAX_REQUEST_BYTES),
    ("grpc.max_metadata_size", 8192),
    ("grpc.max_concurrent_streams", 4),
    ("grpc.max_connection_idle_ms", 60_000),
    ("grpc.max_allowed_incoming_connections", _CONNECTIONS),
    ("grpc.server_handshake_timeout_ms", 10_000),
    ("grpc.so_reuseport", 0),
)


@dataclass(frozen=True)
class DeliveryAddress:
    """Where the delivery service listens; port 0 lets the system choose."""

    host: str
    port: int

    @property
    def target(self) -> str:
        """The address as gRPC takes it."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def default_port(identity: ServerIdentity) -> int:
    """Returns the port on which devices look for releases unless told another.

    Raises:
        ConfigError: the port in the kits is so high that there is none.
    """
    if identity.port + PORT_OFFSET >= 2**16:
        raise ConfigError(
            f"server: the kits name port {identity.port}, and there is no port {PORT_OFFSET} "
            "above it for releases. Nothing was started; choose one, here and on the devices."
        )
    return identity.port + PORT_OFFSET


@asynccontextmanager
async def serve_releases(
    identity: ServerIdentity,
    repository: Path,
    address: DeliveryAddress,
    *,
    on_report: OnReport | None,
) -> AsyncIterator[int]:
    """Serves a repository on this event loop until exit; yields the bound port.

    Call `fedcore.rpc.tls.require_tls_1_3` before gRPC is imported.

    Args:
        identity: The server's key, certificate and roster.
        repository: The folder of the signed repository.
        address: Address to listen on.
        on_report: Callback with each device's report; runs in a thread. None to log them only.

    Raises:
        DataError: there is no repository.
        ResourceError: the port is in use, or may not be used.
        TrustError: the roster is invalid or too old.
    """
    files, roster = PublishedFiles(repository), identity.roster()
    deliveries = Deliveries(files, roster, Watchers(files, roster), on_report)
    kit = identity.kit
    credentials = grpc.ssl_server_credentials(
        [(kit.key_pem(), kit.certificate_pem)],
        root_certificates=kit.authority_pem,
        require_client_auth=True,
    )
    server = grpc.aio.server(options=_OPTIONS)
    server.add_generic_rpc_handlers((deliveries.handler(),))
    try:
        port = server.add_secure_port(address.target, credentials)
    except RuntimeError:
        raise ResourceError(
            f"releases: port {address.port} of {address.host} is in use or forbidden. Nothing was "
            "started; stop the program that uses it, or choose another port."
        ) from None
    await server.start()
    crowd = Crowd(port, most=_CONNECTIONS)
    tasks = [
        asyncio.create_task(deliveries.watchers.follow()),
        asyncio.create_task(_sweep(deliveries, crowd)),
    ]
    log.info("delivering %s on %s:%d", repository, address.host, port)
    try:
        yield port
    finally:
        for task in tasks:
            task.cancel()
        deliveries.watchers.end_all()
        await server.stop(grace=1.0)


async def _sweep(deliveries: Deliveries, crowd: Crowd) -> None:
    """Ends calls and connections that keep others out, forever."""
    while True:
        await asyncio.sleep(SWEEP_S)
        deliveries.sweep()
        await asyncio.to_thread(crowd.sweep, deliveries.open_calls.peers())


def serve_until_stopped(
    identity: ServerIdentity,
    repository: Path,
    address: DeliveryAddress,
    *,
    on_report: OnReport | None,
    started: Callable[[int], None],
) -> None:
    """Serves a repository until SIGTERM or SIGINT.

    ``started`` is called with the port once it listens. Raises what `serve_releases` raises.
    """

    async def serve() -> None:
        over, loop = asyncio.Event(), asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, over.set)
        async with serve_releases(identity, repository, address, on_report=on_report) as port:
            started(port)
            await over.wait()

    asyncio.run(serve())


@contextmanager
def serve_releases_in_thread(
    identity: ServerIdentity,
    repository: Path,
    address: DeliveryAddress,
    *,
    on_report: OnReport | None,
) -> Iterator[int]:
    """Serves a repository in a thread of its own until exit; yields the bound port.

    Raises what `serve_releases` raises.
    """
    service = serve_releases(identity, repository, address, on_report=on_report)
    with served_in_thread(service, name="serve_releases") as port:
        yield port
