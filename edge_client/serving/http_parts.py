"""An HTTP/1.1 server for short requests, with limits on what a peer may send and leave undone.

A connection has one request at a time: the next is read when the one before was answered.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

import httptools

from fedcore.rpc.crowd import Address, plain_address

MAX_HEAD_BYTES = 16 << 10
"""Longest request line with headers."""
_REQUEST_S = 30.0
"""A request must arrive within so many seconds of its first byte."""
_IDLE_S = 120.0
"""A connection without a request is closed after so many seconds."""
_TAKE_S = 30.0
"""So long a peer may take no more than `_TAKE_BYTES` of an answer that waits for it."""
_TAKE_BYTES = 32 << 10
_HELD_BYTES = 256 << 20
"""Most bytes of bodies that have begun to arrive, of all connections together."""
_PIPELINED_BYTES = 64 << 10
"""Most bytes kept of requests that were sent before the one before was answered."""


@dataclass(frozen=True, slots=True)
class HttpRequest:
    """A whole request."""

    method: str
    path: str
    """Without the query, as it was sent."""
    headers: Mapping[str, str]
    """By lower-case name."""
    body: bytes
    certificate: bytes
    """The peer's certificate in DER; empty without TLS."""


@dataclass(frozen=True, slots=True)
class HttpAnswer:
    """A response."""

    status: int
    body: bytes = b""
    content_type: str = "application/json"
    headers: tuple[tuple[str, str], ...] = ()


Reply = Callable[[HttpAnswer], None]
HttpHandler = Callable[[HttpRequest, Reply], None]
"""Answers a request, now or later, in any thread; must not raise."""


@dataclass
class InferenceHttpServer:
    """Settings and connections of the server; `protocol` makes one connection's protocol."""

    handler: HttpHandler
    run_waiting: Callable[[], None]
    """Called after all that has arrived was handed over."""
    max_body_bytes: int
    max_connections: int = 256
    connections: set[InferenceConnection] = field(default_factory=set)
    draining: bool = False
    held_bytes: int = 0
    """Bytes of bodies that have begun to arrive."""
    _scheduled: bool = False

    def protocol(self) -> InferenceConnection:
        """Returns the protocol of a new connection."""
        return InferenceConnection(self)

    def schedule(self, loop: asyncio.AbstractEventLoop) -> None:
        """Has requests run once the loop has read what has arrived on all connections."""
        if not self._scheduled:
            self._scheduled = True
            loop.call_soon(self._run)

    def _run(self) -> None:
        self._scheduled = False
        self.run_waiting()

    def peers(self) -> set[Address]:
        """Returns the addresses of connections whose handshake is complete."""
        return {each.peer for each in list(self.connections)}

    def has_room(self) -> bool:
        """Returns whether one more connection may be opened.

        If there are too many, the one that has waited longest for its peer is closed: connections
        that send nothing, or don't take their answer, keep nobody else out.
        """
        if self.draining:
            return False
        if len(self.connections) >= self.max_connections:
            waiting = [each for each in self.connections if not each.busy]
            if not waiting:
                return False
            longest = min(waiting, key=lambda each: each.waits_since_s)
            self.connections.discard(longest)
            longest.abort()
        return True

    async def drain(self, grace_s: float) -> None:
        """Closes idle connections at once, and the others when their request is answered."""
        self.draining = True
        for connection in list(self.connections):
            connection.close_if_idle()
        end_s = asyncio.get_running_loop().time() + grace_s
        while self.connections and asyncio.get_running_loop().time() < end_s:
            await asyncio.sleep(0.01)
        for connection in list(self.connections):
            connection.abort()


class InferenceConnection(asyncio.Protocol):
    """One connection."""

    def __init__(self, server: InferenceHttpServer) -> None:
        """Waits for `connection_made`."""
        self._server = server
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._parser: Any = httptools.HttpRequestParser(self)
        self._timer: asyncio.TimerHandle | None = None
        self._certificate = b""
        self._later = bytearray()
        self.busy = False
        """Whether a request is being answered."""
        self._full = False
        """Whether an answer waits for the peer to take it."""
        self.waits_since_s = self._loop.time()
        """When the peer was last waited for, by the loop's clock."""
        self.peer: Address = ("", 0)
        self._body = bytearray()
        self._reset()

    def _reset(self) -> None:
        self._head_bytes = self._head_kept = 0
        self._url = bytearray()
        self._headers: dict[str, str] = {}
        self._drop_body()
        self._headed = False
        self._refused = 0
        self._overrun = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Starts a connection; closes it if there are too many."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        if not self._server.has_room():
            transport.abort()
            return
        self._server.connections.add(self)
        if (name := transport.get_extra_info("peername")) is not None:
            self.peer = plain_address(name)
        tls = transport.get_extra_info("ssl_object")
        if isinstance(tls, ssl.SSLObject):
            self._certificate = tls.getpeercert(binary_form=True) or b""
        self._expect(_IDLE_S)

    def connection_lost(self, error: Exception | None) -> None:
        """Forgets the connection."""
        self._server.connections.discard(self)
        self._transport = None
        self._drop_body()
        self._expect(None)

    def pause_writing(self) -> None:
        """Reads no more requests while the peer does not take the answers."""
        self._full = True
        if self._transport is not None:
            self._transport.pause_reading()

    def resume_writing(self) -> None:
        """Goes on with what the peer has sent meanwhile."""
        self._full = False
        if self._transport is not None and not self._transport.is_closing():
            if not self.busy:
                self._expect(_IDLE_S)
            self._loop.call_soon(self._read_on)

    def data_received(self, data: bytes) -> None:
        """Reads a part of a request."""
        if self.busy or self._full or self._later:
            if self._overrun:
                return
            self._later += data
            if len(self._later) > _PIPELINED_BYTES and self._transport is not None:
                self._transport.pause_reading()
            return
        if not self._headed:
            if not self._head_bytes:
                self._expect(_REQUEST_S)
            self._head_bytes += len(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            return  # the request is answered as if it had not asked for another protocol
        except httptools.HttpParserError:
            self._misread()
        else:
            if self._overrun and not self.busy:
                self._close()
            elif not self._headed and not self.busy and self._head_bytes > MAX_HEAD_BYTES:
                self._refuse(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, "the headers are too long")

    def _misread(self) -> None:
        if self.busy:  # the answer to the request before must be the first to go out
            self._overrun = True
        else:
            self._refuse(self._refused or HTTPStatus.BAD_REQUEST, "the request is malformed")

    def _read_on(self) -> None:
        """Reads what came while the request before was answered; then more from the peer."""
        if self._transport is None or self.busy or self._full:
            return
        later, self._later = bytes(self._later), bytearray()
        if later:
            self.data_received(later)
        if self._transport is not None and not self._full:
            self._transport.resume_reading()

    def on_message_begin(self) -> None:
        """Notes a request in the same data as one that is not answered, or whose answer waits.

        The one before is answered, and the connection closed: its client sends the other again.
        """
        self._overrun = self.busy or self._full

    def on_url(self, url: bytes) -> None:
        """Collects the address."""
        if self._overrun:
            return
        self._url += url
        self._limit_head(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        """Keeps a header."""
        if self._overrun:
            return
        self._limit_head(len(name) + len(value) + 4)
        if not self._headed:  # what follows a body in pieces could not be checked before it
            self._headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def _limit_head(self, size: int) -> None:
        self._head_kept += size
        if self._head_kept > MAX_HEAD_BYTES:
            self._stop(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)

    def on_headers_complete(self) -> None:
        """Refuses a body that is announced as too long, before it is read."""
        if self._overrun:
            return
        self._headed = True
        length = self._headers.get("content-length", "0")
        if not length.isdecimal() or int(length[:20]) > self._server.max_body_bytes:
            self._stop(HTTPStatus.REQUEST_ENTITY_TOO_LARGE)
        if self._headers.get("content-encoding", "identity").lower() != "identity":
            self._stop(HTTPStatus.UNSUPPORTED_MEDIA_TYPE)
        if self._parser.should_upgrade() and not {"content-length", "transfer-encoding"}.isdisjoint(
            self._headers
        ):  # the parser leaves such a body to the other protocol
            self._stop(HTTPStatus.NOT_IMPLEMENTED)
        if self._headers.get("expect", "").lower() == "100-continue" and self._transport:
            self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def on_body(self, body: bytes) -> None:
        """Keeps a part of the body."""
        if self._overrun:
            return
        self._body += body
        self._server.held_bytes += len(body)
        if len(self._body) > self._server.max_body_bytes:
            self._stop(HTTPStatus.REQUEST_ENTITY_TOO_LARGE)
        if self._server.held_bytes > max(_HELD_BYTES, self._server.max_body_bytes):
            self._stop(HTTPStatus.SERVICE_UNAVAILABLE)

    def _drop_body(self) -> None:
        self._server.held_bytes -= len(self._body)
        self._body = bytearray()

    def _stop(self, status: HTTPStatus) -> None:
        self._refused = status
        raise ValueError(status.phrase)  # httptools turns it into an HttpParserCallbackError

    def on_message_complete(self) -> None:
        """Hands the request over."""
        if self._overrun:
            return
        self.busy = True
        self._expect(None)
        request = HttpRequest(
            method=self._parser.get_method().decode("latin-1"),
            path=bytes(self._url).partition(b"?")[0].decode("latin-1"),
            headers=self._headers,
            body=bytes(self._body),
            certificate=self._certificate,
        )
        self._drop_body()
        keep = self._parser.should_keep_alive() and not self._parser.should_upgrade()
        self._server.handler(request, lambda answer: self._reply(answer, keep))
        self._server.schedule(self._loop)

    def _reply(self, answer: HttpAnswer, keep: bool) -> None:
        try:
            here = asyncio.get_running_loop() is self._loop
        except RuntimeError:  # another thread
            here = False
        if here:
            self._write(answer, keep)
        else:
            self._loop.call_soon_threadsafe(self._write, answer, keep)

    def _write(self, answer: HttpAnswer, keep: bool) -> None:
        transport = self._transport
        if transport is None:
            return
        keep = keep and not self._server.draining and not self._overrun
        self.busy = False
        transport.write(response_bytes(answer, keep=keep))
        if not keep:
            self._close()
            return
        self._reset()
        if self._full:
            self._expect_taken(transport.get_write_buffer_size())
        else:
            self._expect(_IDLE_S)
            self._loop.call_soon(self._read_on)

    def _close(self) -> None:
        """Closes the connection once the peer has taken what was written."""
        if self._transport is not None:
            self._transport.close()
            self._expect_taken(self._transport.get_write_buffer_size())

    def _expect_taken(self, left: int) -> None:
        """Closes the connection at once if the peer does not take what was written."""

        def look() -> None:
            now = 0 if self._transport is None else self._transport.get_write_buffer_size()
            if left - now < _TAKE_BYTES:
                self.abort()
            else:
                self._expect_taken(now)

        self._expect(_TAKE_S, look)

    def _refuse(self, status: int, why: str) -> None:
        """Answers a request that cannot be read on, and closes the connection."""
        if self._transport is None or self._transport.is_closing():
            return
        phrase = HTTPStatus(status).phrase if status != HTTPStatus.BAD_REQUEST else why
        body = b'{"error":"' + phrase.encode() + b'. Nothing was answered."}'
        self._transport.write(response_bytes(HttpAnswer(status, body), keep=False))
        self._close()

    def _expect(self, seconds: float | None, late: Callable[[], None] | None = None) -> None:
        """Closes the connection, or calls ``late``, if the next step takes so many seconds."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer, self.waits_since_s = None, self._loop.time()
        if seconds is not None:
            self._timer = self._loop.call_later(seconds, late or self.abort)

    def close_if_idle(self) -> None:
        """Closes the connection unless a request is being answered."""
        if not self.busy:
            self._close()

    def abort(self) -> None:
        """Closes the connection at once."""
        if self._transport is not None:
            self._transport.abort()


_LINES = {status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n" for status in HTTPStatus}


def response_bytes(answer: HttpAnswer, *, keep: bool) -> bytes:
    """Returns a response as it is sent."""
    head = [_LINES[answer.status], f"content-type: {answer.content_type}\r\n"]
    head.append(f"content-length: {len(answer.body)}\r\n")
    head += [f"{name}: {value}\r\n" for name, value in answer.headers]
    head.append("\r\n" if keep else "connection: close\r\n\r\n")
    return "".join(head).encode("latin-1") + answer.body
