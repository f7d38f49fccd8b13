"""A server of TLS that answers as it is told, however odd that is."""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import httpx
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
)

from fedcore.flower.fleet_pull import BoundedClient

Behave = Callable[[Any, bytes], None]
"""Gets the connection, and the first bytes of each request with its body; answers it."""


def contexts(folder: Path) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """Of a server on 127.0.0.1, and of clients that trust it."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), 1)
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(hours=1))
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False
        )
        .sign(key, hashes.SHA256())
    )
    pem = certificate.public_bytes(Encoding.PEM)
    plain = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    (folder / "both.pem").write_bytes(plain + pem)
    serving = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    serving.load_cert_chain(folder / "both.pem")
    return serving, ssl.create_default_context(cadata=pem.decode())


@contextmanager
def answering(behave: Behave, context: ssl.SSLContext | None) -> Iterator[int]:
    """Has ``behave`` answer requests on a port of 127.0.0.1; without a context, without TLS."""
    listener = socket.create_server(("127.0.0.1", 0))
    threads: list[threading.Thread] = []

    def serve(raw: socket.socket) -> None:
        with suppress(OSError), raw:
            connection = context.wrap_socket(raw, server_side=True) if context else raw
            with connection:
                while request := _request(connection):
                    behave(connection, request)

    def accept() -> None:
        with suppress(OSError):
            while True:
                raw, _ = listener.accept()
                raw.settimeout(20.0)
                threads.append(threading.Thread(target=serve, args=(raw,)))
                threads[-1].start()

    accepting = threading.Thread(target=accept)
    accepting.start()
    try:
        yield listener.getsockname()[1]
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        accepting.join()
        for one in threads:
            one.join(30.0)
            assert not one.is_alive()


def _request(connection: socket.socket) -> bytes:
    """A request with its body; empty at the connection's end."""
    came = b""
    while b"\r\n\r\n" not in came:
        if not (piece := connection.recv(1 << 16)):
            return b""
        came += piece
    head, _, body = came.partition(b"\r\n\r\n")
    fields = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:])
    left = int(fields.get(b"content-length", b"0")) - len(body)
    while left > 0:
        if not (piece := connection.recv(1 << 16)):
            return b""
        left -= len(piece)
        came += piece
    return came


def answer_of(body: bytes) -> bytes:
    """An honest answer."""
    return b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(body) + body


def endless(connection: Any, head: bytes, piece: bytes) -> None:
    """Sends ``piece`` after ``head`` until the other side has enough."""
    connection.sendall(head)
    while True:
        connection.sendall(piece)


class Plain:
    """An interceptor of Flower's client that changes nothing."""

    def intercept(self, context: Any, call_next: Any) -> httpx.Response:
        assert context.request.headers["content-type"].endswith("protobuf")
        response: httpx.Response = call_next(context)
        return response


def bounded(
    address: str,
    verify: ssl.SSLContext,
    *,
    stopped: Callable[[], bool] = lambda: False,
    moved: Callable[[int], None] = lambda count: None,
) -> BoundedClient:
    """A client that changes nothing of its calls, and waits a second for each piece."""
    return BoundedClient(
        address, interceptor=Plain(), verify=verify, timeout_s=1.0, stopped=stopped, moved=moved
    )
