"""Who is at the other end of a connection: uvicorn's protocol, with the peer's certificate."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from fedcore.crypto.certificates import peer_public
from fedcore.errors import TrustError
from server.live.network.answer import Together
from server.live.network.body import Buffers, read_body
from server.live.network.connections import Connections

PUBLIC_KEY = "fedcore.public_key"
"""Where a request's scope holds the key that its connection was opened with."""
DIVERT = "fedcore.divert"
"""Where it holds what has the rest of its body go elsewhere, see `PeerProtocol.divert`."""
_MAX_HEADER_BYTES = 2**15
_MOST_AHEAD = 8
"""Calls that may come before one is answered. A device sends none; a large answer is over for it a
moment before it is for the server."""
_WAITING_BYTES = 2**16
"""What may wait in a connection for its other end, each way, before more is asked for."""


Sink = Callable[[bytes | memoryview], None]
Divert = Callable[[MutableMapping[str, Any], Sink, int | None], "asyncio.Future[None] | None"]


@dataclass
class _Diverted:
    sink: Sink
    ended: asyncio.Future[None]


class PeerProtocol(HttpToolsProtocol):
    """HTTP/1.1 for one connection, which knows whose it is and how long headers may be.

    uvicorn hands no certificate to the application, and its parser keeps any length of headers.
    """

    public = b""
    seen = 0.0
    due: float | None = None
    stuck: float | None = None
    _descriptor = -1
    _header_bytes = 0
    _in_headers = True
    _diverted: _Diverted | None = None
    _unparsed = 0
    """Bytes of the body that goes on, which the parser will not see."""

    def __init__(
        self, *arguments: Any, connections: Connections, buffers: Buffers, **named: Any
    ) -> None:
        """As uvicorn's own; ``connections`` hears of this one, bodies come through ``buffers``."""
        super().__init__(*arguments, **named)
        self._known = connections
        self._buffers = buffers

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Reads the key out of the peer's certificate, once a connection."""
        super().connection_made(transport)
        transport.set_write_buffer_limits(_WAITING_BYTES)
        tls: ssl.SSLObject | None = transport.get_extra_info("ssl_object")
        if tls is not None:
            # OpenSSL keeps what its buffers have once grown to, by default 1 MiB a connection.
            transport.set_read_buffer_limits(_WAITING_BYTES)  # type: ignore[attr-defined]
        certificate = tls.getpeercert(binary_form=True) if tls is not None else None
        try:
            public: bytes | None = peer_public(certificate) if certificate is not None else None
        except TrustError:
            public = None
        self.app_state = {**self.app_state, PUBLIC_KEY: public, DIVERT: self.divert}
        self.public = public or b""
        self._descriptor = transport.get_extra_info("socket").fileno()
        self._known.proved(self._descriptor, self)

    def data_received(self, data: bytes) -> None:
        """Feeds the parser, unless headers have grown past any that a client sends."""
        self.seen = self._known.now()
        if self._unparsed:
            view = memoryview(data)
            data = bytes(view[self._take_unparsed(view) :])
            if not data:
                return
        if self._in_headers:
            self._header_bytes += len(data)
            if self.due is None:
                self._known.waits_for_headers(self)
        super().data_received(data)
        if self._in_headers and self._header_bytes > _MAX_HEADER_BYTES:
            self._refuse(f"headers of more than {_MAX_HEADER_BYTES} bytes")
        elif len(self.pipeline) > _MOST_AHEAD:  # with each answer uvicorn reads further ones
            self._refuse(f"more than {_MOST_AHEAD} calls before the first was answered")

    def _refuse(self, text: str) -> None:
        if not self.transport.is_closing():
            self._known.refused(self._descriptor, 400, text)
            self.transport.abort()

    def shutdown(self) -> None:
        """Ends the connection, at once where no call is going on.

        A peer that lies idle would leave the server waiting for its half of the goodbye.
        """
        if self.busy():
            super().shutdown()
        else:
            self.transport.abort()

    def divert(
        self, scope: MutableMapping[str, Any], sink: Sink, left_bytes: int | None
    ) -> asyncio.Future[None] | None:
        """Has the rest of a request's body go to ``sink`` as it comes in, piece by piece.

        By uvicorn's own way each piece is copied twice, and wakes a task. What is given back is
        done once the last piece has come, and holds what ``sink`` raised, or a ConnectionError
        where the peer went away. None where no more of the body of ``scope`` is to come here.

        Args:
            scope: Of the request.
            sink: Keeps nothing of a piece: its memory is used for the next one.
            left_bytes: How much follows what the application was given, as the request's length
                says; None where it has none. What has a length needs no parser to find its end.
        """
        cycle = self.cycle
        if cycle is None or cycle.scope is not scope or not cycle.more_body or cycle.disconnected:
            return None
        self._diverted = _Diverted(sink, self.loop.create_future())
        ended, waiting = self._diverted.ended, bytes(cycle.body)
        cycle.body = bytearray()
        if waiting:
            self._feed(self._diverted, waiting)
        self.flow.resume_reading()
        if left_bytes is not None and left_bytes > len(waiting):
            self._unparsed = left_bytes - len(waiting)
            read_body(self.transport, self._buffers, self._take_body)
        return ended

    def _take_body(self, piece: memoryview) -> bool:
        self.data_received(piece)  # type: ignore[arg-type]  # what is to be kept is copied there
        return self._unparsed > 0

    def _take_unparsed(self, piece: memoryview) -> int:
        """Takes what a piece has of the body that the parser does not see; how much that is."""
        body = piece[: self._unparsed]
        self._unparsed -= len(body)
        # Where it is waited for no longer, it is passed over.
        if self._diverted is not None and not self._diverted.ended.done():
            self._feed(self._diverted, body)
        if not self._unparsed:
            self.on_message_complete()
            self.parser = httptools.HttpRequestParser(self)  # the old one expects the body still
        return len(body)

    def on_body(self, body: bytes) -> None:
        """Takes a piece of a request's body."""
        diverted = self._diverted
        if diverted is None:
            super().on_body(body)
        elif diverted.ended.done():  # nobody waits for it any more
            self._diverted = None
            super().on_body(body)
        else:
            self._feed(diverted, body)

    def _feed(self, diverted: _Diverted, body: bytes | memoryview) -> None:
        try:
            diverted.sink(body)
        except Exception as error:  # whatever it is, the waiting caller is told
            self._diverted = None
            diverted.ended.set_exception(error)

    def _end_diverted(self, error: Exception | None = None) -> None:
        diverted, self._diverted = self._diverted, None
        if diverted is None or diverted.ended.done():
            return
        if error is None:
            diverted.ended.set_result(None)
        else:
            diverted.ended.set_exception(error)

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is over."""
        self._end_diverted(ConnectionResetError("the peer went away while it sent"))
        self.app_state = {}  # what refers to this connection
        super().connection_lost(exc)

    def busy(self) -> bool:
        """Whether a call is going on."""
        return self.cycle is not None and not self.cycle.response_complete

    def drop(self) -> None:
        """Ends the connection at once, whatever is going on."""
        self.transport.abort()

    def pause_writing(self) -> None:
        """The peer does not read what it was sent."""
        self.stuck = self._known.now()
        super().pause_writing()

    def resume_writing(self) -> None:
        """It does again."""
        self.stuck = None
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        """Refuses what is no HTTP."""
        self._known.refused(self._descriptor, 400, msg)
        super().send_400_response(msg)

    def on_headers_complete(self) -> None:
        """Begins the request."""
        self._in_headers, self._header_bytes, self.due = False, 0, None
        before = self.cycle
        super().on_headers_complete()
        if self.cycle is not before:
            Together(self.cycle)

    def on_message_complete(self) -> None:
        """Headers follow next."""
        self._end_diverted()
        self._in_headers, self.due = True, None
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """What a peer still sends of a request that was answered is waited for no longer."""
        if not self._in_headers:
            self._known.waits_for_headers(self)
        super().on_response_complete()


def divert_of(state: dict[str, Any]) -> Divert | None:
    """What has the rest of a request's body go elsewhere; None where it cannot."""
    divert: Divert | None = state.get(DIVERT)
    return divert


def key_of(state: dict[str, Any]) -> bytes | None:
    """The key that the connection of a request was opened with."""
    public: bytes | None = state.get(PUBLIC_KEY)
    return public
