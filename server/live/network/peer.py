"""uvicorn's HTTP protocol, extended by the peer's key, limits on headers, and streamed bodies."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

from fedcore.crypto.certificates import peer_public
from fedcore.errors import TrustError
from server.live.network.body import Buffers, read_body
from server.live.network.connections import Connections
from server.live.network.uvicorn_parts import HttpConnection

PUBLIC_KEY = "fedcore.public_key"
"""Key of a scope's state for the public key in the peer's certificate."""
DIVERT = "fedcore.divert"
"""Key of a scope's state for its connection's `PeerProtocol.divert`."""
_MAX_HEADER_BYTES = 2**15
_MAX_AHEAD = 8
"""Maximum number of pipelined requests. Devices do not pipeline, but a large answer ends for the
device a moment before it ends for the server."""
_WAITING_BYTES = 2**16
"""Size of a connection's buffer, in each direction, above which reading or writing pauses."""


Sink = Callable[[bytes | memoryview], None]
Divert = Callable[[MutableMapping[str, Any], Sink, int | None], "asyncio.Future[None] | None"]


@dataclass
class _Diverted:
    sink: Sink
    ended: asyncio.Future[None]


class PeerProtocol(HttpConnection):
    """HTTP/1.1 protocol of one connection, with the peer's key and a limit on headers.

    uvicorn does not pass the peer's certificate to the application, and its parser accepts headers
    of any length.
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
    """Remaining bytes of the current body that bypass the parser."""

    def __init__(
        self, *arguments: Any, connections: Connections, buffers: Buffers, **named: Any
    ) -> None:
        """Creates the protocol of one connection.

        Args:
            arguments: Passed to uvicorn's protocol.
            connections: Registry to which this connection reports.
            buffers: Buffers for streamed bodies, shared by all connections.
            named: Passed to uvicorn's protocol.
        """
        super().__init__(*arguments, **named)
        self._known = connections
        self._buffers = buffers

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Extracts the key from the peer's certificate, and limits the connection's buffers."""
        super().connection_made(transport)
        transport.set_write_buffer_limits(_WAITING_BYTES)
        tls: ssl.SSLObject | None = transport.get_extra_info("ssl_object")
        if tls is not None:
            # OpenSSL's buffers never shrink; by default they grow to 1 MiB per connection.
            transport.set_read_buffer_limits(_WAITING_BYTES)  # type: ignore[attr-defined]
        certificate = tls.getpeercert(binary_form=True) if tls is not None else None
        try:
            public: bytes | None = peer_public(certificate) if certificate is not None else None
        except TrustError:
            public = None
        self.share({PUBLIC_KEY: public, DIVERT: self.divert})
        self.public = public or b""
        self._descriptor = transport.get_extra_info("socket").fileno()
        self._known.handshake_done(self._descriptor, self)

    def data_received(self, data: bytes) -> None:
        """Feeds the parser; aborts the connection if its headers or pipeline exceed the limits."""
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
        elif self.requests_ahead() > _MAX_AHEAD:  # uvicorn resumes reading after each answer
            self._refuse(f"more than {_MAX_AHEAD} calls before the first was answered")

    def _refuse(self, text: str) -> None:
        if not self.transport.is_closing():
            self._known.refused(self._descriptor, 400, text)
            self.transport.abort()

    def shutdown(self) -> None:
        """Closes the connection: after the current request, or at once if there is none.

        An idle connection is aborted, as its peer might never complete the TLS shutdown.
        """
        if self.busy():
            super().shutdown()
        else:
            self.transport.abort()

    def divert(
        self, scope: MutableMapping[str, Any], sink: Sink, left_bytes: int | None
    ) -> asyncio.Future[None] | None:
        """Streams the rest of a request's body to ``sink``, piece by piece as it arrives.

        This is faster than ASGI's ``receive``, which copies each piece twice and wakes a task.

        Args:
            scope: The request's ASGI scope.
            sink: Consumer of a piece; must not keep it, as its memory is reused for the next.
            left_bytes: Bytes of the body that the application has not received, by the request's
                content length; None if there is none. With a length, the body bypasses the parser.

        Returns:
            A future that completes after the last piece, or fails with the error that ``sink``
            raised, or with ConnectionResetError if the peer disconnects. None if no more of the
            body will arrive.
        """
        waiting = self.take_body(scope)
        if waiting is None:
            return None
        self._diverted = _Diverted(sink, asyncio.get_running_loop().create_future())
        ended = self._diverted.ended
        if waiting:
            self._feed(self._diverted, waiting)
        if left_bytes is not None and left_bytes > len(waiting):
            self._unparsed = left_bytes - len(waiting)
            read_body(self.transport, self._buffers, self._take_body)
        return ended

    def _take_body(self, piece: memoryview) -> bool:
        self.data_received(piece)  # type: ignore[arg-type]  # copies anything that it keeps
        return self._unparsed > 0

    def _take_unparsed(self, piece: memoryview) -> int:
        """Consumes the part of a piece that bypasses the parser; returns its length in bytes."""
        body = piece[: self._unparsed]
        self._unparsed -= len(body)
        # If nobody awaits the body any more, discard it.
        if self._diverted is not None and not self._diverted.ended.done():
            self._feed(self._diverted, body)
        if not self._unparsed:
            self.end_body()
        return len(body)

    def on_body(self, body: bytes) -> None:
        """Passes a parsed piece of a request's body to the sink, or to uvicorn if there is none."""
        diverted = self._diverted
        if diverted is None:
            super().on_body(body)
        elif diverted.ended.done():  # nobody awaits it any more
            self._diverted = None
            super().on_body(body)
        else:
            self._feed(diverted, body)

    def _feed(self, diverted: _Diverted, body: bytes | memoryview) -> None:
        try:
            diverted.sink(body)
        except Exception as error:  # any error goes to the task that awaits the body
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
        """Fails a body that is still arriving, and releases the connection."""
        self._end_diverted(ConnectionResetError("the peer went away while it sent"))
        self.share_nothing()  # breaks the reference cycle through `divert`
        super().connection_lost(exc)

    def drop(self) -> None:
        """Closes the connection at once, even during a request."""
        self.transport.abort()

    def pause_writing(self) -> None:
        """Records when the peer stopped reading, and pauses the answer."""
        self.stuck = self._known.now()
        super().pause_writing()

    def resume_writing(self) -> None:
        """Records that the peer reads again, and resumes the answer."""
        self.stuck = None
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        """Logs and answers data that is not valid HTTP."""
        self._known.refused(self._descriptor, 400, msg)
        super().send_400_response(msg)

    def on_headers_complete(self) -> None:
        """Resets the limits on headers, and starts the request."""
        self._in_headers, self._header_bytes, self.due = False, 0, None
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """Completes a streamed body; the next data are headers."""
        self._end_diverted()
        self._in_headers, self.due = True, None
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """Starts a deadline for the rest of a request that was answered before it was complete."""
        if not self._in_headers:
            self._known.waits_for_headers(self)
        super().on_response_complete()


def divert_of(state: dict[str, Any]) -> Divert | None:
    """Returns the `PeerProtocol.divert` of a request's connection; None if it has none."""
    divert: Divert | None = state.get(DIVERT)
    return divert


def key_of(state: dict[str, Any]) -> bytes | None:
    """Returns the public key of a request's peer; None if its certificate is missing or invalid."""
    public: bytes | None = state.get(PUBLIC_KEY)
    return public
