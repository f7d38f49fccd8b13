"""Somebody else where a device looks for its server."""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any


@contextmanager
def stranger(
    project: Any, tmp_path: Path, *, host: str = "127.0.0.1", port: int = 0
) -> Iterator[list[str]]:
    """Somebody else's TLS server, on the server's port unless another is named.

    Yields what became of each handshake.
    """
    other = type(project)(tmp_path / "stranger", port=project.port)
    kit = other.server().kit
    path = tmp_path / "stranger.pem"
    path.write_bytes(kit.certificate_pem)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(path, kit.key_path)
    listener = socket.create_server((host, port or project.port))
    seen: list[str] = []

    def serve() -> None:
        while True:
            try:
                plain, _ = listener.accept()
            except OSError:
                return
            with plain, suppress(OSError):
                plain.settimeout(5)
                try:
                    context.wrap_socket(plain, server_side=True).close()
                    seen.append("trusted")
                except ssl.SSLError:
                    seen.append("refused")

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield seen
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(10)
