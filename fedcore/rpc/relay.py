"""A local way to a server whose every byte is counted, for clients that count none themselves.

gRPC's core reads whatever its connection brings: pings, settings and unknown frames are answered or
dropped there, and no caller is told of them. Here they pass a socket of ours first. TLS stays
between gRPC and the server; what passes here is its records.
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
"""Read at a time, and waited for: what a server sends beyond stays with it."""
_LOOK_S = 0.5
_STUCK_S = 20.0
"""How long one side may take to read what the other has sent."""
_LONGEST_ROOT = 60  # systems take 104 bytes or 108 for the path of a socket
_MOST_ANSWER = 1 << 13
"""Bytes of a proxy's answer."""


@dataclass(frozen=True)
class RelayedRoute:
    """What leads to a server, once."""

    target: str
    """For gRPC."""
    over: threading.Event
    """Set when it leads nowhere any more."""


@contextmanager
def relayed(
    host: str, port: int, *, proxy: str | None, timeout_s: float, took: Callable[[int], None]
) -> Iterator[RelayedRoute]:
    """A way to ``host`` and ``port`` through a socket of this process.

    Nobody else on the machine can reach it, or stand in its place once it is gone: it lies in a
    folder that this user alone may enter, which stays.

    Args:
        host: Of the server.
        port: Of the server.
        proxy: The HTTP proxy to go through, as a URL; None to go there directly.
        timeout_s: How long connecting may take.
        took: Told how many bytes have passed, in either direction; it may wait, and nothing is read
            from the server meanwhile.

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
            target=_pump, args=(listener, path, server, took, over), name="relay", daemon=True
        ).start()
        yield RelayedRoute(f"unix:{path}", over)
    finally:
        over.set()
        with suppress(OSError):
            server.shutdown(socket.SHUT_RDWR)  # ends a read that is going on in the other thread
        path.unlink(missing_ok=True)


def _folder() -> Path:
    """Where sockets lie: one folder a user, or one of this call's where that is somebody else's."""
    short = "/tmp"  # noqa: S108  the folder in it is made, or found, to be this user's alone
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
        raise OSError("a proxy that is reached by TLS is not supported for streams")
    server = dial(parts.hostname or "", parts.port or 80, timeout_s)
    try:
        there = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        asked = f"CONNECT {there} HTTP/1.1\r\nHost: {there}\r\n"
        if parts.username is not None:
            own = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
            asked += f"Proxy-Authorization: Basic {base64.b64encode(own.encode()).decode()}\r\n"
        server.sendall(f"{asked}\r\n".encode())
        came = b""
        while not came.endswith(b"\r\n\r\n"):  # byte by byte: what follows is the server's
            server.settimeout(max(until_s - time.monotonic(), 0.001))
            piece = server.recv(1)
            if not piece or len(came) > _MOST_ANSWER:
                raise OSError("the proxy did not answer as one does")
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
) -> None:
    """Hands on what comes from either side until one of them ends; sets ``over`` then."""
    with ExitStack() as ending, listener, server, suppress(OSError):
        ending.callback(over.set)
        local = _accepted(listener, over)
        path.unlink(missing_ok=True)  # now: a process that is killed leaves nothing
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
                    if not (piece := one.recv(_PIECE)):
                        return
                    other[one].sendall(piece)
                    took(len(piece))


def _accepted(listener: socket.socket, over: threading.Event) -> socket.socket | None:
    """The one client that there is; None where it does not come."""
    while not over.is_set():
        with suppress(TimeoutError):
            local, _ = listener.accept()
            listener.close()
            return local
    return None
