"""Releases from any static web server or bucket over HTTPS.

The server needs no identity of the project: signatures and digests vouch for what it sends. Only
``GET`` with ``Range`` is used. Redirects are refused, so that a server cannot send a device on to
addresses inside its own network. Every request has a deadline.
"""

from __future__ import annotations

import base64
import http.client
import io
import os
import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any
from urllib.parse import SplitResult, quote, unquote, urlsplit

from edge_client.delivery.resuming import Interrupted, resumed
from edge_client.delivery.source import Source
from fedcore.errors import ConfigError, DataError, RepositoryUnreachable, TrustError
from fedcore.observability.foreign import foreign
from fedcore.rpc.delivery import CHUNK_BYTES
from fedcore.rpc.proxy import check_proxies, proxy_for

_CONNECT_S, _READ_S, _REQUEST_S = 10.0, 30.0, 60.0
"""Longest time to connect, between two pieces, and for a request; a file goes on in another."""
_BESIDE_BYTES = 128 << 10
"""Most bytes of a response beside its content, and a sixteenth of that: headers, interim responses,
framing. http.client reads them without end."""
_MISSING = (403, 404, 410)
"""A bucket whose content may not be listed answers 403 for what it does not have."""
_BUSY = (408, 429, 500, 502, 503, 504)
_AFTER = "The previous version keeps serving."


def is_url(repository: str) -> bool:
    """Returns whether a repository is named by an address, not a folder."""
    return "://" in repository


def https_source(url: str, *, stop: threading.Event | None = None) -> Source:
    """Returns a source for a repository on a web server.

    The system's authorities vouch for the server's certificate; ``SSL_CERT_FILE`` names others.

    Args:
        url: Address of the folder that contains ``metadata`` and ``targets``.
        stop: Set to end waits between attempts early.

    Raises:
        ConfigError: it is no address of the form ``https://HOST[:PORT]/PATH``, or a proxy that the
            environment names cannot be used.
    """
    parts = _parsed(url)
    check_proxies(os.environ)
    context = ssl.create_default_context()
    context.minimum_version = ssl.TLSVersion.TLSv1_2

    def unreachable(error: Exception) -> RepositoryUnreachable:
        return RepositoryUnreachable(
            f"{url}: no releases from there ({foreign(error, 300)}). What has been fetched is "
            f"kept. {_AFTER} Check the address and the network, then run again."
        )

    def read(name: str, offset: int) -> Iterator[bytes]:
        path = f"{parts.path.rstrip('/')}/{quote(name)}"
        once = partial(_once, parts.hostname or "", parts.port or 443, path, context)
        return resumed(once, offset, stop=stop or threading.Event(), unreachable=unreachable)

    return read


def _parsed(url: str) -> SplitResult:
    try:
        parts = urlsplit(url)
        known = parts.scheme == "https" and parts.hostname and (parts.port or 443) > 0
    except ValueError:
        known = False
    plain = url.isascii() and url.isprintable() and " " not in url
    if not known or not plain or parts.username or parts.query or parts.fragment:
        raise ConfigError(
            f"--repository {foreign(url, 200)}: expected a folder, or an address of the form "
            "https://HOST[:PORT]/PATH. Nothing was fetched."
        )
    return parts


def _once(host: str, port: int, path: str, context: ssl.SSLContext, offset: int) -> Iterator[bytes]:
    """Yields a file from an offset on, over one connection."""
    with _connected(host, port, context) as connection, _as_interrupted():
        ranged = {"Range": f"bytes={offset}-"} if offset else {}
        connection.request("GET", path, headers={"Accept-Encoding": "identity", **ranged})
        response = connection.getresponse()
        assert isinstance(response, _Response)
        if response.status == 416:  # there is nothing from this offset on
            return
        _check(response, host)
        if response.length is None and not response.chunked:
            raise Interrupted("the answer does not say where it ends")
        skipped = 0 if response.status == 206 else offset  # it knows no ranges: read past them
        if response.status == 206 and _start(response) != offset:
            raise Interrupted("it sent another range than the one asked for")
        while content := response.read1(CHUNK_BYTES):
            response.received.allow(len(content))
            kept = content[skipped:]
            skipped = max(skipped - len(content), 0)
            if kept:
                yield kept
        if response.length:  # fewer bytes than it announced
            raise Interrupted("the connection ended early")


def _check(response: http.client.HTTPResponse, host: str) -> None:
    status = response.status
    if status in (200, 206):
        return
    if status in _MISSING:
        raise FileNotFoundError(f"status {status}")
    if status in _BUSY:
        raise Interrupted(f"status {status}")
    if 300 <= status < 400:
        raise TrustError(
            f"{host}: it redirects to another address, which this device does not follow. Nothing "
            f"was installed. {_AFTER} Give the final address with --repository."
        )
    raise DataError(
        f"{host}: expected a file, got status {status}. Nothing was installed. {_AFTER} Check the "
        "address with --repository."
    )


def _start(response: http.client.HTTPResponse) -> int:
    """Returns the first byte of a partial answer; -1 if it does not say."""
    unit, _, rest = (response.getheader("Content-Range") or "").partition(" ")
    first = rest.partition("-")[0]
    return int(first) if unit == "bytes" and first.isdecimal() and len(first) < 19 else -1


class _Received(io.RawIOBase):
    """The bytes of a response, of which little may be anything but content."""

    def __init__(self, raw: io.RawIOBase) -> None:
        self._raw, self._left = raw, _BESIDE_BYTES

    def allow(self, content_bytes: int) -> None:
        """Says how many of the bytes that came were content."""
        self._left += content_bytes + content_bytes // 16

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        found = self._raw.readinto(buffer)
        self._left -= found or 0
        if self._left < 0:
            raise http.client.HTTPException("it sent far more than its content")
        return found

    def close(self) -> None:
        self._raw.close()
        super().close()


class _Response(http.client.HTTPResponse):
    """A response whose bytes are counted; also a proxy's."""

    def __init__(self, sock: socket.socket, *args: Any, **options: Any) -> None:
        super().__init__(sock, *args, **options)
        self.received = _Received(self.fp.detach())
        self.fp = io.BufferedReader(self.received)


@contextmanager
def _connected(
    host: str, port: int, context: ssl.SSLContext
) -> Iterator[http.client.HTTPSConnection]:
    """Yields a connection that is shut down when its time is over."""
    proxy = proxy_for(f"https://{host}:{port}", os.environ)
    if proxy is None:
        connection = http.client.HTTPSConnection(host, port, timeout=_CONNECT_S, context=context)
    else:
        through = urlsplit(proxy)
        connection = http.client.HTTPSConnection(
            through.hostname or "", through.port or 80, timeout=_CONNECT_S, context=context
        )
        connection.set_tunnel(host, port, headers=_authorization(through))

    connection.response_class = _Response

    def shut() -> None:
        if (sock := connection.sock) is not None:
            with suppress(OSError):
                socket.socket.shutdown(sock, socket.SHUT_RDWR)

    ending = threading.Timer(_REQUEST_S, shut)
    ending.daemon = True
    ending.start()
    try:
        with _as_interrupted():
            connection.connect()
            connection.sock.settimeout(_READ_S)
        yield connection
    finally:
        ending.cancel()
        connection.close()


def _authorization(proxy: SplitResult) -> dict[str, str]:
    if proxy.username is None:
        return {}
    own = f"{unquote(proxy.username)}:{unquote(proxy.password or '')}"
    return {"Proxy-Authorization": f"Basic {base64.b64encode(own.encode()).decode()}"}


@contextmanager
def _as_interrupted() -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise
    except ssl.SSLCertVerificationError as error:
        raise TrustError(
            f"repository: the server's certificate is not valid ({foreign(error, 200)}). Nothing "
            f"was installed. {_AFTER} Check the address; SSL_CERT_FILE names other authorities."
        ) from None
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise Interrupted(f"{type(error).__name__}: {error}") from None
