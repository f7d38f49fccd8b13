"""Runs the server: gRPC and HTTP on two ports of one process, until it is told to stop."""

from __future__ import annotations

import asyncio
import itertools
import logging
import signal
import socket
from asyncio.sslproto import SSLProtocol
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edge_client.serving.access import Access
from edge_client.serving.batching import QueueLimits
from edge_client.serving.grpc_parts import GrpcLoop, server_credentials
from edge_client.serving.grpc_service import STREAMING, GrpcService
from edge_client.serving.http_parts import InferenceHttpServer
from edge_client.serving.http_service import HttpService
from edge_client.serving.models import Models, Opener
from edge_client.serving.page import Page
from edge_client.serving.service import Service, log_fault
from fedcore.errors import ResourceError
from fedcore.rpc.crowd import SWEEP_S, Crowd, raise_file_limit

log = logging.getLogger("fedcore.serving")

_HANDSHAKE_S = 10.0
_MAX_FILES = 16_384
"""Open files of the process, if the system grants so many: a crowd leaves none of 1024."""
_TLS_BYTES = 1 << 16
"""Bytes that a connection over TLS reads at a time."""
LOOK_S = 0.5
"""How often the store is looked at for a newly activated version, in seconds."""
_TELL_LOOKS = 20
"""After so many looks the agent on this device is told of requests and failures."""


@dataclass(frozen=True, kw_only=True)
class ServeSettings:
    """What to serve and where; the command's options have the same names."""

    store: Path
    names: tuple[str, ...] | None = None
    """The models; None for all that are installed."""
    host: str = "127.0.0.1"
    grpc_port: int = 8001
    """0 lets the system choose."""
    http_port: int = 8000
    """0 lets the system choose."""
    limits: QueueLimits = field(default_factory=QueueLimits)
    max_request_bytes: int = 16 << 20
    """Longest request."""
    max_calls: int = 512
    """Most gRPC calls that are open, and most connections of either kind."""
    drain_s: float = 10.0
    """How long requests that have arrived may take after the server was told to stop."""


@dataclass(frozen=True)
class Addresses:
    """Where the server listens."""

    grpc: str
    http: str


async def serve(
    settings: ServeSettings,
    access: Access,
    opener: Opener,
    *,
    started: Callable[[Addresses], None],
    stop: asyncio.Event | None = None,
) -> None:
    """Serves until ``stop`` is set or the process gets SIGTERM or SIGINT, and drains.

    Guarantee:
        Every request that was accepted is answered, within ``settings.drain_s`` after the stop.

    Args:
        settings: What to serve and where.
        access: Who may connect.
        opener: Opens a model's version.
        started: Called when both ports listen and every model has been opened.
        stop: Set to stop; None to stop on signals, which only a main thread may receive.

    Raises:
        DeviceError: no model is installed.
        ResourceError: a port is in use.
        FedcoreError: a model that was named cannot be served.
    """
    models = Models(settings.store, settings.names, opener, settings.limits)
    http_socket = _listen(settings.host, settings.http_port)
    try:
        models.open()
    except BaseException:
        http_socket.close()
        raise
    service = Service(models)
    loop = asyncio.get_running_loop()
    if stop is None:
        stop = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
    http = _http(settings, service, access)
    grpc_loop = _grpc(settings, service, access)
    grpc_port = grpc_loop.bind(settings.host, settings.grpc_port, _credentials(access))
    # asyncio's default of 256 KiB is allocated for each handshake that has begun.
    SSLProtocol.max_size = _TLS_BYTES
    server = await loop.create_server(
        http.protocol,
        sock=http_socket,
        ssl=access.context(),
        ssl_handshake_timeout=None if access.identity is None else _HANDSHAKE_S,
    )
    raise_file_limit(_MAX_FILES)
    grpc_loop.start()
    crowd = Crowd(http_socket.getsockname()[1], most=settings.max_calls)
    scheme = "http" if access.identity is None else "https"
    started(
        Addresses(
            _address(settings.host, grpc_port),
            f"{scheme}://{_address(settings.host, http_socket.getsockname()[1])}",
        )
    )
    tasks = [
        asyncio.create_task(_watch(models)),
        asyncio.create_task(_keep_room(grpc_loop, http, crowd)),
    ]
    await stop.wait()
    log.info("serve: stopping; requests that have arrived are answered")
    service.draining = True
    for task in tasks:
        task.cancel()
    server.close()
    await asyncio.gather(
        asyncio.to_thread(grpc_loop.stop, settings.drain_s), http.drain(settings.drain_s)
    )
    await asyncio.to_thread(models.stop)
    await asyncio.to_thread(models.tell)
    await asyncio.gather(*tasks, return_exceptions=True)


def _address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _listen(host: str, port: int) -> socket.socket:
    """Returns a listening socket.

    Raises:
        ResourceError: the port is in use, or may not be used.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(256)
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        raise ResourceError(
            f"serve: cannot listen on port {port} of {host} ({error.strerror}). Nothing was "
            "started; stop the program that uses it, or choose another with --http-port."
        ) from None
    return listener


def _http(settings: ServeSettings, service: Service, access: Access) -> InferenceHttpServer:
    routes = HttpService(
        service,
        Page(lambda: described(service.models)),
        access.role_of_der,
        plain=access.identity is None,
    )
    return InferenceHttpServer(
        routes.handle,
        service.models.run_waiting,
        max_body_bytes=settings.max_request_bytes,
        max_connections=settings.max_calls,
    )


def _grpc(settings: ServeSettings, service: Service, access: Access) -> GrpcLoop:
    methods = GrpcService(service, access.role_of_pem, tls=access.identity is not None)
    return GrpcLoop(
        methods.handle,
        service.models.run_waiting,
        streaming=STREAMING,
        max_message_bytes=settings.max_request_bytes,
        max_calls=settings.max_calls,
        max_connections=settings.max_calls,
    )


def _credentials(access: Access) -> Any:
    if access.identity is None:
        return None
    kit = access.identity.kit
    return server_credentials(kit.key_pem(), kit.certificate_pem, kit.authority_pem)


async def _keep_room(grpc_loop: GrpcLoop, http: InferenceHttpServer, crowd: Crowd) -> None:
    """Ends connections that do nothing and are too many, and handshakes on the port of HTTP."""
    while True:
        await asyncio.sleep(SWEEP_S)
        await asyncio.to_thread(grpc_loop.keep_room)
        await asyncio.to_thread(crowd.sweep, http.peers())


async def _watch(models: Models) -> None:
    """Follows the store: what an update activates answers from then on."""
    for look in itertools.count(1):
        await asyncio.sleep(LOOK_S)
        try:
            for line in await asyncio.to_thread(models.refresh):
                log.info("serve: %s", line)
            await asyncio.to_thread(models.count)
            if look % _TELL_LOOKS == 0:
                await asyncio.to_thread(models.tell)
        except Exception as error:  # without this task no later version would ever answer
            log_fault("looking for a new version", error)


def described(models: Models) -> list[dict[str, Any]]:
    """Returns what the page shows of each model that answers, as JSON values."""
    return [
        {"name": served.name, **served.current.card()}
        for served in models.served()
        if served.current is not None
    ]
