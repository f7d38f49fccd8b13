"""The HTTP server in front of the Fleet API: uvicorn over TLS 1.3, on a socket that we create."""

from __future__ import annotations

import asyncio
import socket
from asyncio.sslproto import SSLProtocol
from functools import partial
from typing import cast

import uvicorn

from fedcore.crypto.roster import ServerIdentity, server_context
from fedcore.errors import ResourceError
from server.live.network.body import Buffers
from server.live.network.connections import Connections
from server.live.network.gate import Gate
from server.live.network.peer import PeerProtocol
from server.live.network.uvicorn_parts import HttpServer

_BACKLOG = 1024
_IDLE_S = 90
"""Seconds after which an idle connection is closed. A device that is woken sooner needs no new
handshake."""


_TLS_BYTES = 2**16
"""Bytes that a connection reads at a time: four TLS records."""


def http_server(gate: Gate, identity: ServerIdentity, connections: Connections) -> HttpServer:
    """Creates the HTTP server, without starting it.

    Args:
        gate: The ASGI application.
        identity: The server's key and certificate.
        connections: Tracks connections; serve on a socket from its `listener`.
    """
    # asyncio's default of 256 KiB is allocated up to three times per connection, until it closes.
    SSLProtocol.max_size = _TLS_BYTES
    protocol = partial(PeerProtocol, connections=connections, buffers=Buffers())
    return HttpServer(
        uvicorn.Config(
            gate,
            http=cast("type[asyncio.Protocol]", protocol),
            ssl_context_factory=lambda config, default: server_context(identity),
            lifespan="off",
            ws="none",
            log_config=None,
            log_level="error",  # our own log shows peers' actions, by name and throttled
            access_log=False,
            proxy_headers=False,  # a peer could fake its address with these headers
            server_header=False,
            date_header=True,  # devices compare their clocks with it
            timeout_keep_alive=_IDLE_S,
            timeout_graceful_shutdown=5,
        )
    )


def bind(host: str, port: int, *, option: str = "--listen") -> socket.socket:
    """Returns a TCP socket that listens on ``host`` and ``port``.

    ``option`` is the command-line option for another port, which the error message names.

    Raises:
        ResourceError: the port is in use, or may not be used.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio disables Nagle's algorithm, which costs 40 ms per call, only if this names TCP.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        raise ResourceError(
            f"server: cannot listen on port {port} of {host} ({error.strerror}). Nothing was "
            f"started; stop the program that uses it, or choose another with {option}."
        ) from None
    return listener
