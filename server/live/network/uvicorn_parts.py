"""What the server uses of uvicorn beyond its documented interface, in one place.

uvicorn documents `Config` and `Server.serve`; protocols, request cycles and the server's state are
private and may change in any minor release. Only this module touches them. `pyproject.toml` bounds
uvicorn's version, and ``tests/contract/test_uvicorn_private.py`` checks each use.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any

import httptools
import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from server.live.network.answer import CoalescingTransport


class HttpServer(uvicorn.Server):
    """uvicorn's server without its signal handlers; its caller handles signals."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Captures no signals."""
        yield

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Closes all connections, including those whose handshake completes meanwhile."""
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


class HttpConnection(HttpToolsProtocol):
    """uvicorn's protocol of one HTTP/1.1 connection, with names for what is private in it.

    Response heads are sent with the bodies that follow them.
    """

    def share(self, values: dict[str, Any]) -> None:
        """Adds values to the state that the application sees in each request's scope."""
        self.app_state = {**self.app_state, **values}

    def share_nothing(self) -> None:
        """Empties that state, which breaks reference cycles through its values."""
        self.app_state = {}

    def busy(self) -> bool:
        """Returns whether a request is being answered."""
        return self.cycle is not None and not self.cycle.response_complete

    def requests_ahead(self) -> int:
        """Returns the number of requests that arrived before the current one was answered."""
        return len(self.pipeline)

    def take_body(self, scope: MutableMapping[str, Any]) -> bytes | None:
        """Takes over a request's body from uvicorn, and has the connection read on.

        Returns:
            The part that has arrived and that the application has not received; None if no more of
            the body will arrive, or if ``scope`` is not the current request's.
        """
        cycle = self.cycle
        if cycle is None or cycle.scope is not scope or not cycle.more_body or cycle.disconnected:
            return None
        waiting, cycle.body = bytes(cycle.body), bytearray()
        self.flow.resume_reading()
        return waiting

    def end_body(self) -> None:
        """Completes a request whose body bypassed the parser; the next data are headers."""
        self.on_message_complete()
        self.parser = httptools.HttpRequestParser(self)  # the old one still expects the body

    def on_headers_complete(self) -> None:
        """Starts the request."""
        before = self.cycle
        super().on_headers_complete()
        if self.cycle is not before:
            coalesce_head(self.cycle)


def coalesce_head(cycle: RequestResponseCycle) -> None:
    """Has a request's response head wait for the body that follows it."""
    transport = CoalescingTransport(cycle.transport, lambda: cycle.response_started)
    ended = cycle.on_response

    def complete() -> None:
        transport.flush()
        ended()

    cycle.transport = transport  # type: ignore[assignment]
    cycle.on_response = complete
