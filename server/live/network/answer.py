"""Optimization of HTTP responses: sends the head and the body in one TLS record."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import RequestResponseCycle


class CoalescingTransport:
    """Wrapper around one request's transport that delays the response head until the body follows.

    uvicorn writes head and body separately. Over TLS that costs two records, two system calls, and
    two wake-ups of the peer: much of the cost of a small call.
    """

    def __init__(self, cycle: RequestResponseCycle) -> None:
        """Replaces the transport of ``cycle`` by this wrapper."""
        self._cycle = cycle
        self._transport: asyncio.Transport = cycle.transport
        self._ended = cycle.on_response
        self._head: bytes | None = None
        cycle.transport = self  # type: ignore[assignment]
        cycle.on_response = self._complete

    def write(self, data: bytes) -> None:
        """Buffers ``data`` if it is the response head; else sends it, behind a buffered head."""
        if self._head is None and self._cycle.response_started:
            self._head = data
            return
        if self._head:
            self._head, data = b"", self._head + data
        self._transport.write(data)

    def close(self) -> None:
        """Sends a buffered head, and closes the transport."""
        self._flush()
        self._transport.close()

    def __getattr__(self, name: str) -> Any:
        """Returns the attribute of the wrapped transport."""
        return getattr(self._transport, name)

    def _complete(self) -> None:
        self._flush()
        self._ended()

    def _flush(self) -> None:
        """Sends a buffered head without a body, as in the response to a HEAD request."""
        if self._head:
            self._head, data = b"", self._head
            self._transport.write(data)
