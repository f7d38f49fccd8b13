"""The server's side of administration: a Unix socket for local users, and TLS for remote ones.

`serve_operators` and `serve_operators_in_thread` serve the socket, `operator_handler` handles
requests that arrive at the network port. All authenticate the sender and pass the request to
`Control.answer`.
"""

from __future__ import annotations

import asyncio
import json
import os
import pwd
import signal
import socket
import struct
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any

from fedcore.crypto.roster import Member, ServerIdentity
from fedcore.crypto.roster_seen import SEEN
from fedcore.errors import ResourceError
from fedcore.files import lock_folder, remove_unfinished
from server.live.network.asgi import Receive, Scope, Send
from server.live.network.gate import Operate
from server.live.network.serve import Listening
from server.live.operators.client import OPERATE, SOCKET, reachable
from server.live.operators.control import Control
from server.live.operators.drained import DRAINED
from server.live.operators.protocol import MAX_REQUEST_BYTES, Requester
from server.operator_log import MARK
from server.process.loop_thread import served_in_thread

_REQUEST_S = 10.0
"""Timeout in seconds for receiving a request, and for sending the answer."""
_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid


@contextmanager
def server_lock(folder: Path) -> Iterator[None]:
    """Context manager that locks a server's folder against a second server.

    Also removes what a killed server left half-written.

    Raises:
        ResourceError: another server is running with this folder.
    """
    refused = ResourceError(
        f"{folder}: a server is running with this identity. Nothing was started; wait for the "
        "end of its run (`fedcore server status`), stop it (`fedcore server stop`), or run "
        "another server with its own project and identity."
    )
    with lock_folder(folder, refused):
        remove_unfinished(folder, DRAINED, SEEN, MARK)
        yield


def check_socket(identity: ServerIdentity) -> None:
    """Checks that the administration socket can be created, and removes it again.

    Raises:
        ResourceError: the socket cannot be created.
    """
    path = identity.kit.folder / SOCKET
    _bind(path).close()
    path.unlink(missing_ok=True)


@asynccontextmanager
async def serve_operators(
    control: Control, identity: ServerIdentity, listening: Listening | None
) -> AsyncIterator[None]:
    """Serves the administration socket on this event loop, until exit.

    ``listening`` is None once the rounds have ended, see `Control.open`.

    Raises:
        ResourceError: the socket cannot be created.
        DiskFull: there is no room for the audit log.
    """
    control.open(identity, listening)
    path = identity.kit.folder / SOCKET
    answering = set[asyncio.Future[None]]()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            found = await _request(reader, writer)
            if found is not None:
                answer = asyncio.ensure_future(_answer(control, *found, reader, writer))
                answering.add(answer)
                answer.add_done_callback(answering.discard)
                await answer
        finally:
            writer.close()

    try:
        server = await asyncio.start_unix_server(serve, sock=_bind(path), limit=MAX_REQUEST_BYTES)
        try:
            yield
        finally:
            server.close()
            path.unlink(missing_ok=True)
    finally:
        await asyncio.to_thread(control.close)
        if answering:
            await asyncio.wait(answering)


@contextmanager
def serve_operators_in_thread(control: Control, identity: ServerIdentity) -> Iterator[None]:
    """Serves the administration socket in a thread, while the main thread finishes the run.

    SIGTERM, SIGINT and an operator's stop then interrupt the main thread.

    Raises:
        KeyboardInterrupt: a signal or an operator's stop arrived.
        ResourceError: the socket cannot be created.
        DiskFull: there is no room for the audit log.
    """
    for number in (signal.SIGTERM, signal.SIGINT):  # replaces the handlers of the rounds
        signal.signal(number, signal.default_int_handler)
    service = serve_operators(control, identity, None)
    with served_in_thread(service, name="serve_operators"):
        yield


def operator_handler(control: Control) -> Operate:
    """Returns the handler for requests of operators and viewers over TLS, for the `Gate`."""

    async def operate(scope: Scope, receive: Receive, send: Send, member: Member) -> None:
        if scope["path"] != OPERATE or scope["method"] != "POST":
            return await _respond(send, 404, {"detail": "no such endpoint"})
        raw = b""
        try:
            async with asyncio.timeout(_REQUEST_S):
                more = True
                while more and len(raw) <= MAX_REQUEST_BYTES:
                    event = await receive()
                    raw += event.get("body", b"")
                    more = event["type"] == "http.request" and event.get("more_body", False)
        except TimeoutError:
            return await _respond(send, 408, {"detail": f"it took longer than {_REQUEST_S:g} s"})
        if len(raw) > MAX_REQUEST_BYTES:
            return await _respond(send, 413, {"detail": f"more than {MAX_REQUEST_BYTES} bytes"})
        peer = (scope.get("client") or ("?",))[0]
        sender = Requester(f"{member.name} ({member.fingerprint[:16]}, {peer})", member.role, False)
        loop = asyncio.get_running_loop()
        answer = await loop.run_in_executor(control.threads, control.answer, raw, sender)
        return await _respond(send, 200, answer)

    return operate


async def _respond(send: Send, status: int, value: dict[str, Any]) -> None:
    body = json.dumps(value).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
    ]
    if status != 200:
        headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _bind(path: Path) -> socket.socket:
    """Creates a listening socket that only this user can open; replaces a killed server's one."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    mask = os.umask(0o177)
    try:
        path.unlink(missing_ok=True)
        with reachable(path) as short:
            listener.bind(short)
        listener.listen(16)
    except OSError as error:
        listener.close()
        raise ResourceError(
            f"{path}: cannot create this socket ({error.strerror or error}). Nothing was "
            "started; the server's folder must be on a file system of this machine, and writable."
        ) from None
    finally:
        os.umask(mask)
    return listener


async def _request(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> tuple[bytes, Requester | None] | None:
    """Reads one request line, and who sent it; returns None if none came in time.

    The sender is None if it is not authorized.
    """
    try:
        sender = _peer_of(writer.get_extra_info("socket"))
        async with asyncio.timeout(_REQUEST_S):
            return await reader.readline(), sender
    except (TimeoutError, ValueError, ConnectionError):  # ValueError: a line past the limit
        return None


async def _answer(
    control: Control,
    raw: bytes,
    sender: Requester | None,
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
) -> None:
    """Executes a request and writes the answer, one line of JSON."""
    if sender is None:
        answer: dict[str, Any] = {
            "ok": False,
            "error": "TrustError",
            "message": "only the server's own user and root may connect. Nothing was done.",
        }
    else:
        disconnected = threading.Event()
        watching = asyncio.create_task(_watch(reader, disconnected))
        try:
            answer = await asyncio.get_running_loop().run_in_executor(
                control.threads, control.answer, raw, sender, disconnected.is_set
            )
        finally:
            watching.cancel()
    with suppress(ConnectionError, TimeoutError):  # the client may have disconnected
        writer.write(json.dumps(answer).encode() + b"\n")
        async with asyncio.timeout(_REQUEST_S):
            await writer.drain()


async def _watch(reader: asyncio.StreamReader, disconnected: threading.Event) -> None:
    """Sets ``disconnected`` when the client disconnects; discards anything that it still sends."""
    with suppress(ConnectionError):
        while await reader.read(MAX_REQUEST_BYTES):
            pass
    disconnected.set()


def _peer_of(connection: socket.socket) -> Requester | None:
    """Identifies the peer by its kernel credentials; returns None if not this user or root."""
    option = getattr(socket, "SO_PEERCRED", None)
    if option is None:  # not Linux: the socket's mode admits only its owner and root
        return Requester(f"uid {os.getuid()}", "operator", True)
    raw = connection.getsockopt(socket.SOL_SOCKET, option, _CREDENTIALS.size)
    pid, uid, _ = _CREDENTIALS.unpack(raw)
    if uid not in (0, os.getuid()):
        return None
    try:
        name = pwd.getpwuid(uid).pw_name
    except KeyError:
        name = "unknown"
    return Requester(f"{name} (uid {uid}, pid {pid})", "operator", True)
