"""The HTTP server in front of the Fleet API: uvicorn, on a socket of ours, over TLS 1.3."""

from __future__ import annotations

import asyncio
import socket
from asyncio.sslproto import SSLProtocol
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import cast

import uvicorn

from fedcore.crypto.roster import ServerIdentity, server_context
from fedcore.errors import ResourceError
from server.live.network.body import Buffers
from server.live.network.connections import Connections
from server.live.network.gate import Gate
from server.live.network.peer import PeerProtocol

_BACKLOG = 1024
_IDLE_S = 90
"""How long a connection may lie idle; a device that is woken within it shakes hands no second
time."""


_TLS_BYTES = 2**16
"""What a connection reads at a time: four TLS records."""


def http_server(gate: Gate, identity: ServerIdentity, connections: Connections) -> uvicorn.Server:
    """A server that answers by ``gate`` and shows ``identity``; it is not started.

    ``connections`` hears of each, and has made the socket that it is to be served on.
    """
    # asyncio's 256 KiB are held up to three times, by every connection and to its end.
    SSLProtocol.max_size = _TLS_BYTES
    protocol = partial(PeerProtocol, connections=connections, buffers=Buffers())
    return _Http(
        uvicorn.Config(
            gate,
            http=cast("type[asyncio.Protocol]", protocol),
            ssl_context_factory=lambda config, default: server_context(identity),
            lifespan="off",
            ws="none",
            log_config=None,
            log_level="error",  # what peers do is told by ours, with a name and not too often
            access_log=False,
            proxy_headers=False,  # a peer's address is where it comes from, not what it claims
            server_header=False,
            date_header=True,  # devices compare their clocks with it
            timeout_keep_alive=_IDLE_S,
            timeout_graceful_shutdown=5,
        )
    )


class _Http(uvicorn.Server):
    """uvicorn, which leaves signals to whoever runs it."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Captures none."""
        yield

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Ends connections, those too that were shaking hands when it began."""
        closing = asyncio.create_task(self._close_late())
        try:
            await super().shutdown(sockets)
        finally:
            closing.cancel()
            for connection in list(self.server_state.connections):
                connection.transport.abort()

    async def _close_late(self) -> None:
        while True:
            await asyncio.sleep(0.1)
            for connection in list(self.server_state.connections):
                connection.shutdown()


def bind(host: str, port: int, *, option: str = "--listen") -> socket.socket:
    """A socket that listens; ``option`` is what another port is chosen with.

    Raises:
        ResourceError: the port is in use, or may not be used.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # Where the protocol is not named, asyncio leaves Nagle's algorithm on: 40 ms more a call.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        raise ResourceError(
            f"server: port {port} of {host} cannot be listened on ({error.strerror}). Nothing was "
            f"started; stop what uses it, or choose another with {option}."
        ) from None
    return listener
