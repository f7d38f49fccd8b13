"""Optimization of HTTP responses: sends the head and the body in one TLS record."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any


class CoalescingTransport:
    """Wrapper around one request's transport that delays the response head until the body follows.

    uvicorn writes head and body separately. Over TLS that costs two records, two system calls, and
    two wake-ups of the peer: much of the cost of a small call.
    """

    def __init__(self, transport: asyncio.Transport, started: Callable[[], bool]) -> None:
        """Wraps ``transport``.

        Args:
            transport: The connection's transport.
            started: Returns whether the response has begun: the first write after that is its head.
        """
        self._transport = transport
        self._started = started
        self._head: bytes | None = None

    def write(self, data: bytes) -> None:
        """Buffers ``data`` if it is the response head; else sends it, behind a buffered head."""
        if self._head is None and self._started():
            self._head = data
            return
        if self._head:
            self._head, data = b"", self._head + data
        self._transport.write(data)

    def close(self) -> None:
        """Sends a buffered head, and closes the transport."""
        self.flush()
        self._transport.close()

    def __getattr__(self, name: str) -> Any:
        """Returns the attribute of the wrapped transport."""
        return getattr(self._transport, name)

    def flush(self) -> None:
        """Sends a buffered head without a body, as in the response to a HEAD request."""
        if self._head:
            self._head, data = b"", self._head
            self._transport.write(data)
