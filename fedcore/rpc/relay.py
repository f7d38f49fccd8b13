"""A local socket that relays to a server and counts every byte, for clients that cannot.

gRPC's core reads everything its connection receives: it handles or drops pings, settings and
unknown frames without notice to the caller. The relay puts a socket of this process in front. TLS
stays between gRPC and the server; the relay passes on encrypted records.
"""

from __future__ import annotations

import base64
import os
import secrets
import selectors
import socket
import stat
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from fedcore.rpc.dial import dial

_PIECE = 4096
"""Default bytes per read; the next read waits for ``took``, which throttles a flooding server."""
_LOOK_S = 0.5
_STUCK_S = 20.0
"""Seconds that one side may take to read what the other has sent."""
_LONGEST_ROOT = 60  # systems allow 104 or 108 bytes for the path of a socket
_MAX_ANSWER = 1 << 13
"""Most bytes of a proxy's response."""


@dataclass(frozen=True)
class RelayedRoute:
    """A single-use local route to a server."""

    target: str
    """Target address for a gRPC channel."""
    over: threading.Event
    """Set once the route has ended."""


@contextmanager
def relayed(
    host: str,
    port: int,
    *,
    proxy: str | None,
    timeout_s: float,
    took: Callable[[int], None],
    piece_bytes: int = _PIECE,
    linger_s: float = 0.0,
) -> Iterator[RelayedRoute]:
    """Opens a route to ``host`` and ``port`` through a local socket of this process.

    No other user of the machine can connect to the socket, or replace it after its removal: it
    is in a permanent folder that only this user may enter.

    Args:
        host: The server's host.
        port: The server's port.
        proxy: URL of the HTTP proxy to connect through; None to connect directly.
        timeout_s: Seconds that connecting may take.
        took: Callback with the number of bytes passed in either direction; may block, which
            pauses reads from the server.
        piece_bytes: Most bytes of one read; files need larger ones than calls.
        linger_s: Seconds that the local side stays open after the server's has ended. gRPC drops
            received messages that nobody has read when its connection ends; this is time to read
            them.

    Raises:
        OSError: the server, or the proxy, cannot be reached.
    """
    server = _connected(host, port, proxy, timeout_s)
    over = threading.Event()
    path = _folder() / secrets.token_hex(8)
    try:
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(path))
        listener.listen(1)
        listener.settimeout(_LOOK_S)
        threading.Thread(
            target=_pump,
            args=(listener, path, server, took, over, piece_bytes, linger_s),
            name="relay",
            daemon=True,
        ).start()
        yield RelayedRoute(f"unix:{path}", over)
    finally:
        over.set()
        with suppress(OSError):
            server.shutdown(socket.SHUT_RDWR)  # unblocks a pending read in the relay thread
        path.unlink(missing_ok=True)


def _folder() -> Path:
    """Returns a private folder for sockets: the user's, or a new one if that is not private."""
    short = "/tmp"  # noqa: S108  the folder in it is created, or checked, to be private
    roots = [root for root in (tempfile.gettempdir(), short) if len(root) < _LONGEST_ROOT]
    folder = Path(roots[0]) / f"fedcore-{os.getuid()}"
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()
    own = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid()
    if own and not found.st_mode & 0o077:
        return folder
    return Path(tempfile.mkdtemp(prefix="fedcore-", dir=roots[0]))


def _connected(host: str, port: int, proxy: str | None, timeout_s: float) -> socket.socket:
    if proxy is None:
        return dial(host, port, timeout_s)
    until_s = time.monotonic() + timeout_s
    parts = urlsplit(proxy)
    if parts.scheme != "http":
        raise OSError("a proxy reached over TLS is not supported for streams")
    server = dial(parts.hostname or "", parts.port or 80, timeout_s)
    try:
        there = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        asked = f"CONNECT {there} HTTP/1.1\r\nHost: {there}\r\n"
        if parts.username is not None:
            own = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
            asked += f"Proxy-Authorization: Basic {base64.b64encode(own.encode()).decode()}\r\n"
        server.sendall(f"{asked}\r\n".encode())
        came = b""
        while not came.endswith(b"\r\n\r\n"):  # byte by byte: what follows belongs to the server
            server.settimeout(max(until_s - time.monotonic(), 0.001))
            piece = server.recv(1)
            if not piece or len(came) > _MAX_ANSWER:
                raise OSError("the proxy did not answer like an HTTP proxy")
            came += piece
        status = came.split(b"\r\n", 1)[0].split(b" ")
        if len(status) < 2 or status[1] != b"200":
            raise OSError("the proxy refused the connection")
    except BaseException:
        server.close()
        raise
    return server


def _pump(
    listener: socket.socket,
    path: Path,
    server: socket.socket,
    took: Callable[[int], None],
    over: threading.Event,
    piece_bytes: int,
    linger_s: float,
) -> None:
    """Copies bytes between both sides until one of them ends; then sets ``over``."""
    with ExitStack() as ending, listener, server, suppress(OSError):
        ending.callback(over.set)
        local = _accepted(listener, over)
        path.unlink(missing_ok=True)  # at once, so that a killed process leaves no file
        if local is None:
            return
        other = {local: server, server: local}
        with local, selectors.DefaultSelector() as selector:
            for one in other:
                one.settimeout(_STUCK_S)
                selector.register(one, selectors.EVENT_READ)
            while not over.is_set():
                for key, _ in selector.select(_LOOK_S):
                    one = local if key.fileobj is local else server
                    if not (piece := _received(one, piece_bytes)):
                        if one is server:
                            over.wait(linger_s)
                        return
                    other[one].sendall(piece)
                    took(len(piece))


def _received(one: socket.socket, piece_bytes: int) -> bytes:
    """Returns the next piece; empty if the other side ended the connection, or reset it."""
    try:
        return one.recv(piece_bytes)
    except ConnectionError:
        return b""


def _accepted(listener: socket.socket, over: threading.Event) -> socket.socket | None:
    """Returns the only client's connection; None if the route ends first."""
    while not over.is_set():
        with suppress(TimeoutError):
            local, _ = listener.accept()
            listener.close()
            return local
    return None
