"""An answer that goes out in one piece."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import RequestResponseCycle


class Together:
    """Stands for the transport of one call, and sends the head of its answer with what follows.

    uvicorn writes the two one after the other. Over TLS that is two records and two calls of the
    system, and the peer is woken twice: a good part of what a small call takes.
    """

    def __init__(self, cycle: RequestResponseCycle) -> None:
        """Takes the place of the call's transport."""
        self._cycle = cycle
        self._transport: asyncio.Transport = cycle.transport
        self._ended = cycle.on_response
        self._head: bytes | None = None
        cycle.transport = self  # type: ignore[assignment]
        cycle.on_response = self._complete

    def write(self, data: bytes) -> None:
        """Sends it, unless it is the head."""
        if self._head is None and self._cycle.response_started:
            self._head = data
            return
        if self._head:
            self._head, data = b"", self._head + data
        self._transport.write(data)

    def close(self) -> None:
        """Ends the connection, once everything has gone."""
        self._flush()
        self._transport.close()

    def __getattr__(self, name: str) -> Any:
        """All else is the transport's."""
        return getattr(self._transport, name)

    def _complete(self) -> None:
        self._flush()
        self._ended()

    def _flush(self) -> None:
        """A head that nothing follows, as where only that was asked for."""
        if self._head:
            self._head, data = b"", self._head
            self._transport.write(data)
