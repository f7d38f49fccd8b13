"""Limits a device's HTTP requests at the socket: all received bytes, and the total time.

HTTP clients bound bodies and the pause between two pieces. Status lines, headers, interim
responses, the framing of a body and TLS records are additional and unbounded, and a server that
sends a byte now and then keeps a request open forever.
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
"""Seconds between checks whether a waiting request must stop."""
_PIECE = 1 << 16
MIN_PIECE_BYTES = 256
"""Least bytes that a piece counts in the limit on pieces. Each passes several parsers: a response
byte by byte costs a hundred times the work of the same response at once."""
_Found = TypeVar("_Found")


class TooLarge(ValueError):
    """A response has more bytes than its limit."""


@dataclass
class Traffic:
    """Bytes that one request has moved, and its limits."""

    max_bytes: int
    """Limit of received bytes, from the first byte of the TLS handshake on."""
    until_s: float
    """Deadline, on the monotonic clock."""
    stopped: Callable[[], bool] = field(default=lambda: False)
    """Returns whether the request must end soon; polled while it waits."""
    ending_s: float = 0.0
    """Seconds that the request may continue after ``stopped`` returns True."""
    received_bytes: int = 0
    sent_bytes: int = 0
    pieces: int = 0
    """Number of pieces received: segments, records, parts of a body."""

    def left_s(self) -> float:
        """Returns the seconds until the deadline."""
        now = time.monotonic()
        if self.stopped():
            self.until_s = min(self.until_s, now + self.ending_s)
        return self.until_s - now

    def receive(self, count: int) -> None:
        """Counts received bytes.

        Raises:
            TooLarge: the total exceeds ``max_bytes``.
        """
        self.received_bytes += count
        if self.received_bytes > self.max_bytes:
            raise TooLarge(
                f"{self.received_bytes} bytes were received including protocol overhead, "
                f"expected at most {self.max_bytes}"
            )
        self.piece()

    def piece(self) -> None:
        """Counts one received piece.

        Raises:
            TooLarge: there are more pieces than a response has that is not split on purpose.
        """
        self.pieces += 1
        if self.pieces * MIN_PIECE_BYTES > self.max_bytes:
            raise TooLarge(f"the response arrived in {self.pieces} pieces, more than allowed")


class Meter:
    """Maps each thread to the request that it is making."""

    def __init__(self) -> None:
        self._calls = threading.local()

    @contextmanager
    def counted(self, traffic: Traffic) -> Iterator[None]:
        """Counts this thread's traffic inside the block in ``traffic``."""
        self._calls.now = traffic
        try:
            yield
        finally:
            self._calls.now = None

    @property
    def now(self) -> Traffic:
        """The request that this thread is making."""
        found: Traffic | None = getattr(self._calls, "now", None)
        assert found is not None, "a request of this client that is not metered"
        return found


def metered(client: httpx.Client, meter: Meter, *, keep: Collection[str]) -> None:
    """Limits all connections of ``client`` by ``meter``, and drops most response headers.

    httpx has no argument for either. Traffic through proxies from the environment counts, too.

    Args:
        client: A client without open connections.
        meter: Provides the limits of each thread's request.
        keep: Lower-case names of the response headers to keep. httpx acts on others by itself: it
            stores cookies and sends them back, and builds the request of a redirection even if
            it may not follow any.
    """
    backend = _Backend(meter)
    client._transport = _Metered(client._transport, backend, keep)
    for pattern, transport in client._mounts.items():
        if transport is not None:
            client._mounts[pattern] = _Metered(transport, backend, keep)


class _Metered(httpx.BaseTransport):
    """A transport that counts its connections' bytes and drops most response headers."""

    def __init__(
        self, inner: httpx.BaseTransport, backend: httpcore.NetworkBackend, keep: Collection[str]
    ) -> None:
        assert isinstance(inner, httpx.HTTPTransport), "an unsupported version of httpx"
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
    """Opens connections whose bytes are counted."""

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
        """Returns a connection, within the time limit of the thread's request."""
        left_s = self._meter.now.left_s()
        if left_s <= 0:
            raise httpcore.ConnectTimeout("the request has ended")
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
        """Starts TLS on this connection, possibly inside TLS to a proxy."""
        return _Secured(self, self._meter, ssl_context, server_hostname, timeout)


class _Plain(_CountedStream):
    """A TCP connection without TLS."""

    def __init__(self, connected: socket.socket, meter: Meter) -> None:
        self._socket = connected
        self._meter = meter

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        """Returns at least one received byte; none at the end of the connection."""
        call = self._meter.now
        most = min(max_bytes, call.max_bytes - call.received_bytes + 1)
        found = self._tried(partial(self._socket.recv, most), timeout, _READING)
        call.receive(len(found))
        return found

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        """Sends all of ``buffer``."""
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
                raise late("the peer took too long, or this process is stopping")
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
        """Returns a property of the connection for httpcore."""
        if info == "is_readable":  # for an idle one: the peer has closed it, or sent more data
            poll = select.poll()
            poll.register(self._socket, select.POLLIN)
            return bool(poll.poll(0))
        return self._socket if info == "socket" else None


_Errors = tuple[type[Exception], type[Exception]]
"""The exceptions for a timeout and for a broken connection."""
_READING: _Errors = (httpcore.ReadTimeout, httpcore.ReadError)
_WRITING: _Errors = (httpcore.WriteTimeout, httpcore.WriteError)
_CONNECTING: _Errors = (httpcore.ConnectTimeout, httpcore.ConnectError)


class _Secured(_CountedStream):
    """TLS over a connection; all of its records count, including the handshake's."""

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
        """Returns at least one received byte; none at the end of the connection."""
        found = self._done(partial(self._tls.read, max_bytes), timeout, _READING)
        self._meter.now.piece()
        return found

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        """Sends all of ``buffer``."""
        left = memoryview(buffer)
        while left:
            left = left[self._done(partial(self._tls.write, left[:_PIECE]), timeout, _WRITING) :]

    def _done(self, work: Callable[[], _Found], timeout: float | None, errors: _Errors) -> _Found:
        """Returns the result of a TLS operation, after as many reads from the peer as it needs."""
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
            if errors is _READING:  # closed without a TLS closing alert: HTTP detects truncation
                return b""  # type: ignore[return-value]
            raise broken(str(error)) from error
        except ssl.SSLError as error:
            with suppress(httpcore.TimeoutException, httpcore.NetworkError):
                self._flush(timeout)  # sends the TLS alert with the reason
            raise broken(str(error)) from error
        except (httpcore.TimeoutException, httpcore.NetworkError) as error:
            kind = late if isinstance(error, httpcore.TimeoutException) else broken
            raise error if isinstance(error, kind) else kind(str(error)) from error

    def _flush(self, timeout: float | None) -> None:
        if self._outgoing.pending:
            self._below.write(self._outgoing.read(), timeout)

    def close(self) -> None:
        """Closes the underlying connection."""
        self._below.close()

    def get_extra_info(self, info: str) -> Any:
        """Returns a property of the connection for httpcore."""
        return self._tls if info == "ssl_object" else self._below.get_extra_info(info)
