"""HTTP/2 and TLS by hand, for callers that do what no library does."""

from __future__ import annotations

import ctypes
import socket
import ssl
import struct
from datetime import UTC, datetime
from pathlib import Path

from cryptography.hazmat.primitives.serialization import Encoding

from fedcore.crypto.issue import issue_authority
from fedcore.crypto.keys import new_key
from fedcore.crypto.kit import Kit, client_context

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
SETTINGS, HEADERS, DATA, PING = 4, 1, 0, 6
_END_HEADERS, _END_STREAM = 4, 1
_WINDOW = 4  # the setting of a stream's first window
_SSL_OF_OBJECT = 24  # offset of OpenSSL's object in CPython's
_UPDATE_REQUESTED = 1


def frame(kind: int, payload: bytes = b"", *, flags: int = 0, stream: int = 0) -> bytes:
    """One frame."""
    return len(payload).to_bytes(3, "big") + struct.pack(">BBI", kind, flags, stream) + payload


def opening(window: int) -> bytes:
    """What a client sends first; its streams take no more than ``window`` bytes of answers."""
    return PREFACE + frame(SETTINGS, struct.pack(">HI", _WINDOW, window))


def call(stream: int, path: str, message: bytes = b"") -> bytes:
    """A whole unary or streaming-answer gRPC call."""
    fields = {
        ":method": "POST",
        ":scheme": "https",
        ":path": path,
        ":authority": "x",
        "content-type": "application/grpc",
        "te": "trailers",
    }
    block = b"".join(
        b"\x00" + bytes((len(name),)) + name.encode() + bytes((len(value),)) + value.encode()
        for name, value in fields.items()
    )
    body = struct.pack(">BI", 0, len(message)) + message
    return frame(HEADERS, block, flags=_END_HEADERS, stream=stream) + frame(
        DATA, body, flags=_END_STREAM, stream=stream
    )


def dial(
    kit: Kit, port: int, source: str, *, h2: bool, context: ssl.SSLContext | None = None
) -> ssl.SSLSocket:
    """A connection from an address, after its handshake."""
    context = context or client_context(kit)
    if h2:
        context.set_alpn_protocols(["h2"])
    plain = socket.create_connection(("127.0.0.1", port), timeout=10, source_address=(source, 0))
    return context.wrap_socket(plain, server_hostname="127.0.0.1")


def key_updates(connection: ssl.SSLSocket, count: int) -> None:
    """Sends so many requests for new keys, through OpenSSL's own library.

    Raises:
        OSError: the library is not at hand, or the peer has closed the connection.
    """
    library = ctypes.CDLL("libssl.so.3")
    library.SSL_key_update.argtypes = (ctypes.c_void_p, ctypes.c_int)
    library.SSL_do_handshake.argtypes = (ctypes.c_void_p,)
    inner = connection._sslobj  # type: ignore[attr-defined]
    handle = ctypes.c_void_p.from_address(id(inner) + _SSL_OF_OBJECT).value
    for _ in range(count):
        if library.SSL_key_update(handle, _UPDATE_REQUESTED) != 1:
            raise OSError("a key update was refused")
        if library.SSL_do_handshake(handle) != 1:
            raise ConnectionResetError("the peer does not take key updates any more")


def stuffed(kit: Kit, folder: Path, size_bytes: int) -> ssl.SSLContext:
    """TLS of a device whose certificate is followed by others, of so many bytes in all."""
    context, chain = client_context(kit), kit.certificate_pem
    authority = issue_authority(new_key(), project="x" * 40, now=datetime.now(UTC))
    raw = authority.public_bytes(Encoding.PEM)
    size = len(authority.public_bytes(Encoding.DER))
    path = folder / f"chain-{size_bytes}.pem"
    path.write_bytes(chain + raw * (size_bytes // size))
    context.load_cert_chain(path, kit.key_path)
    return context
