"""Connections of a device, counted at the socket: all that a call takes in, and how long it lasts.

HTTP clients bound bodies and the pause between two pieces. Status lines, headers, interim answers,
the framing of a body and the records of TLS come on top of them without a bound, and a server that
sends a byte now and then keeps a call going forever.
"""

from __future__ import annotations

import select
import socket
import ssl
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import httpcore
import httpx

from fedcore.rpc.dial import dial

_LOOK_S = 0.5
"""How often a call that waits looks whether it is to end."""
_PIECE = 1 << 16
LEAST_PIECE_BYTES = 256
"""A piece counts as so many bytes at least, among pieces: each goes through several parsers, so an
answer byte by byte takes a hundred times the work of the same answer at once."""
_Found = TypeVar("_Found")


class TooLarge(ValueError):
    """An answer has more bytes than it may."""


@dataclass
class Traffic:
    """What one call has moved, and how much more it may."""

    most_bytes: int
    """Of all that comes, from the first byte of a handshake on."""
    until_s: float
    """When it must be over, on the monotonic clock."""
    stopped: Callable[[], bool] = field(default=lambda: False)
    """Asked all the while."""
    ending_s: float = 0.0
    """How much longer it may last once it is stopped."""
    received_bytes: int = 0
    sent_bytes: int = 0
    pieces: int = 0
    """In how many it came, as they are handed on: segments, records, parts of a body."""

    def left_s(self) -> float:
        """Seconds until it must be over."""
        now = time.monotonic()
        if self.stopped():
            self.until_s = min(self.until_s, now + self.ending_s)
        return self.until_s - now

    def receive(self, count: int) -> None:
        """Counts bytes that have come.

        Raises:
            TooLarge: they are more than may come.
        """
        self.received_bytes += count
        if self.received_bytes > self.most_bytes:
            raise TooLarge(
                f"{self.received_bytes} bytes have come with what is around the answer, at most "
                f"{self.most_bytes} are taken"
            )
        self.piece()

    def piece(self) -> None:
        """Counts a piece that is handed on.

        Raises:
            TooLarge: they are more than come of an answer that is not cut up on purpose.
        """
        self.pieces += 1
        if self.pieces * LEAST_PIECE_BYTES > self.most_bytes:
            raise TooLarge(
                f"the answer has come in {self.pieces} pieces, which is more than it may"
            )


class Meter:
    """Whose call each thread is in."""

    def __init__(self) -> None:
        self._calls = threading.local()

    @contextmanager
    def counted(self, traffic: Traffic) -> Iterator[None]:
        """What this thread moves inside counts as ``traffic``."""
        self._calls.now = traffic
        try:
            yield
        finally:
            self._calls.now = None

    @property
    def now(self) -> Traffic:
        """The call that this thread is in."""
        found: Traffic | None = getattr(self._calls, "now", None)
        assert found is not None, "a call of this client that nobody counts"
        return found


def metered(client: httpx.Client, meter: Meter, *, keep: Collection[str]) -> None:
    """Has all connections of ``client`` count as ``meter`` says, and drops headers of answers.

    httpx has no argument for either. What goes through proxies that the environment names counts,
    too.

    Args:
        client: Has opened no connection yet.
        meter: Says whose call each thread is in.
        keep: Names of the headers that an answer keeps, in small letters. httpx acts on others by
            itself: it keeps cookies and sends them back, and builds the request that a redirection
            asks for, even where it is told not to follow any.
    """
    backend = _Backend(meter)
    client._transport = _Metered(client._transport, backend, keep)
    for pattern, transport in client._mounts.items():
        if transport is not None:
            client._mounts[pattern] = _Metered(transport, backend, keep)


class _Metered(httpx.BaseTransport):
    """A transport whose connections are counted, and whose answers have few headers."""

    def __init__(
        self, inner: httpx.BaseTransport, backend: httpcore.NetworkBackend, keep: Collection[str]
    ) -> None:
        assert isinstance(inner, httpx.HTTPTransport), "another httpx than the one that is known"
        inner._pool._network_backend = backend
        self._inner, self._keep = inner, frozenset(keep)

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        response = self._inner.handle_request(request)
        kept = [(key, one) for key, one in response.headers.multi_items() if key in self._keep]
        response.headers = httpx.Headers(kept)
        return response

    def close(self) -> None:
        self._inner.close()


class _Backend(httpcore.NetworkBackend):
    """Opens connections that are counted."""

    def __init__(self, meter: Meter) -> None:
        self._meter = meter

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.NetworkStream:
        """A connection of the thread's call."""
        left_s = self._meter.now.left_s()
        if left_s <= 0:
            raise httpcore.ConnectTimeout("the call is over")
        try:
            connected = dial(host, port, left_s if timeout is None else min(timeout, left_s))
        except TimeoutError as error:
            raise httpcore.ConnectTimeout(str(error)) from error
        except OSError as error:
            raise httpcore.ConnectError(str(error)) from error
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return _Plain(connected, self._meter)


class _CountedStream(httpcore.NetworkStream):
    """A connection whose bytes are counted."""

    _meter: Meter

    def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,
    ) -> httpcore.NetworkStream:
        """TLS over this connection; over TLS, too, as through a proxy that is reached by TLS."""
        return _Secured(self, self._meter, ssl_context, server_hostname, timeout)


class _Plain(_CountedStream):
    """A connection, below TLS."""

    def __init__(self, connected: socket.socket, meter: Meter) -> None:
        self._socket = connected
        self._meter = meter

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        """What has come, at least a byte; none at the connection's end."""
        call = self._meter.now
        most = min(max_bytes, call.most_bytes - call.received_bytes + 1)
        found = self._tried(partial(self._socket.recv, most), timeout, _READING)
        call.receive(len(found))
        return found

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        """Sends everything."""
        left = memoryview(buffer)
        while left:
            sent = self._tried(partial(self._socket.send, left[:_PIECE]), timeout, _WRITING)
            self._meter.now.sent_bytes += sent
            left = left[sent:]

    def _tried(self, work: Callable[[], _Found], timeout: float | None, errors: _Errors) -> _Found:
        call = self._meter.now
        end = time.monotonic() + timeout if timeout is not None else float("inf")
        late, broken = errors
        while True:
            left_s = min(call.left_s(), end - time.monotonic())
            if left_s <= 0:
                raise late("the other side took too long, or this process ends")
            try:
                self._socket.settimeout(min(left_s, _LOOK_S))
                return work()
            except TimeoutError:
                continue
            except OSError as error:
                raise broken(str(error)) from error

    def close(self) -> None:
        """Closes the socket."""
        self._socket.close()

    def get_extra_info(self, info: str) -> Any:
        """What httpcore asks of a connection."""
        if info == "is_readable":  # of one that idles: the other side has closed it, or sent more
            poll = select.poll()
            poll.register(self._socket, select.POLLIN)
            return bool(poll.poll(0))
        return self._socket if info == "socket" else None


_Errors = tuple[type[Exception], type[Exception]]
"""What is raised where it takes too long, and where the connection breaks."""
_READING: _Errors = (httpcore.ReadTimeout, httpcore.ReadError)
_WRITING: _Errors = (httpcore.WriteTimeout, httpcore.WriteError)
_CONNECTING: _Errors = (httpcore.ConnectTimeout, httpcore.ConnectError)


class _Secured(_CountedStream):
    """TLS over a connection; its records count, those of the handshake among them."""

    def __init__(
        self,
        below: httpcore.NetworkStream,
        meter: Meter,
        context: ssl.SSLContext,
        server_hostname: str | None,
        timeout: float | None,
    ) -> None:
        self._below, self._meter = below, meter
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(
            self._incoming, self._outgoing, server_hostname=server_hostname
        )
        try:
            self._done(self._tls.do_handshake, timeout, _CONNECTING)
        except BaseException:
            self.close()
            raise

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        """What has come, at least a byte; none at the connection's end."""
        found = self._done(partial(self._tls.read, max_bytes), timeout, _READING)
        self._meter.now.piece()
        return found

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        """Sends everything."""
        left = memoryview(buffer)
        while left:
            left = left[self._done(partial(self._tls.write, left[:_PIECE]), timeout, _WRITING) :]

    def _done(self, work: Callable[[], _Found], timeout: float | None, errors: _Errors) -> _Found:
        """What ``work`` comes to, with as many bytes from the other side as it takes."""
        late, broken = errors
        try:
            while True:
                try:
                    found = work()
                except ssl.SSLWantReadError:
                    self._flush(timeout)
                    if piece := self._below.read(_PIECE, timeout):
                        self._incoming.write(piece)
                    else:
                        self._incoming.write_eof()
                else:
                    self._flush(timeout)
                    return found
        except ssl.SSLEOFError as error:
            if errors is _READING:  # closed without TLS's own end: HTTP sees what is missing
                return b""  # type: ignore[return-value]
            raise broken(str(error)) from error
        except ssl.SSLError as error:
            with suppress(httpcore.TimeoutException, httpcore.NetworkError):
                self._flush(timeout)  # the alert, which tells the other side why
            raise broken(str(error)) from error
        except (httpcore.TimeoutException, httpcore.NetworkError) as error:
            kind = late if isinstance(error, httpcore.TimeoutException) else broken
            raise error if isinstance(error, kind) else kind(str(error)) from error

    def _flush(self, timeout: float | None) -> None:
        if self._outgoing.pending:
            self._below.write(self._outgoing.read(), timeout)

    def close(self) -> None:
        """Closes the connection below."""
        self._below.close()

    def get_extra_info(self, info: str) -> Any:
        """What httpcore asks of a connection."""
        return self._tls if info == "ssl_object" else self._below.get_extra_info(info)
