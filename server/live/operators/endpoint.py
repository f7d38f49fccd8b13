"""Where a server hears its operators: a Unix socket, and the network with their certificates."""

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
from concurrent.futures import Future
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any

from fedcore.crypto.roster import Member, ServerIdentity
from fedcore.errors import ResourceError
from fedcore.files import held_alone
from server.live.network.gate import Operate, Receive, Scope, Send
from server.live.network.serve import Listening
from server.live.operators.client import OPERATE, SOCKET, reachable
from server.live.operators.control import Control
from server.live.operators.protocol import MAX_REQUEST_BYTES, Asker
from server.process.signals import no_signal

_ASK_S = 10.0
"""Seconds within which a request must have come, and an answer must have been taken."""
_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid


@contextmanager
def sole(folder: Path) -> Iterator[None]:
    """Keeps a second server out of a server's folder.

    Raises:
        ResourceError: one is running with it.
    """
    refused = ResourceError(
        f"{folder}: a server is running with this identity. Nothing was started; wait for the end "
        "of its run (`fedcore server status`), stop it (`fedcore server stop`), or run another "
        "with a project and an identity of its own."
    )
    with held_alone(folder, refused):
        yield


def check_socket(identity: ServerIdentity) -> None:
    """Sees that the socket can be made that operators ask by, and removes it again.

    Raises:
        ResourceError: it cannot.
    """
    path = identity.kit.folder / SOCKET
    _bind(path).close()
    path.unlink(missing_ok=True)


@asynccontextmanager
async def operated(
    control: Control, identity: ServerIdentity, listening: Listening | None
) -> AsyncIterator[None]:
    """Lets operators on this machine steer, for as long as the server is up.

    ``listening`` is None where the rounds are over, see `Control.open`.

    Raises:
        ResourceError: the socket cannot be made.
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
def operated_meanwhile(control: Control, identity: ServerIdentity) -> Iterator[None]:
    """As `operated`, in a thread of its own, while the main one does what follows the rounds.

    SIGTERM and SIGINT interrupt that from here on, as an operator's stop does.

    Raises:
        KeyboardInterrupt: any of the three.
        ResourceError: the socket cannot be made.
        DiskFull: there is no room for the audit log.
    """
    for number in (signal.SIGTERM, signal.SIGINT):  # the server had its own
        signal.signal(number, signal.default_int_handler)
    up = Future[tuple[asyncio.AbstractEventLoop, asyncio.Event]]()

    async def serve() -> None:
        over = asyncio.Event()
        async with operated(control, identity, None):
            up.set_result((asyncio.get_running_loop(), over))
            await over.wait()

    def body() -> None:
        try:
            asyncio.run(serve())
        except BaseException as error:
            if up.done():
                raise
            up.set_exception(error)

    thread = threading.Thread(target=body, name="operated", daemon=True)
    with no_signal():  # they come to the thread that finishes the run
        thread.start()
    try:
        loop, over = up.result()
        yield
    finally:
        if up.done() and not up.exception():
            loop.call_soon_threadsafe(over.set)
        thread.join()


def over_network(control: Control) -> Operate:
    """Answers operators and viewers who call over TLS with their certificates."""

    async def operate(scope: Scope, receive: Receive, send: Send, member: Member) -> None:
        if scope["path"] != OPERATE or scope["method"] != "POST":
            return await _respond(send, 404, {"detail": "no such call"})
        raw = b""
        try:
            async with asyncio.timeout(_ASK_S):
                more = True
                while more and len(raw) <= MAX_REQUEST_BYTES:
                    event = await receive()
                    raw += event.get("body", b"")
                    more = event["type"] == "http.request" and event.get("more_body", False)
        except TimeoutError:
            return await _respond(send, 408, {"detail": f"it took longer than {_ASK_S:g} s"})
        if len(raw) > MAX_REQUEST_BYTES:
            return await _respond(send, 413, {"detail": f"more than {MAX_REQUEST_BYTES} bytes"})
        peer = (scope.get("client") or ("?",))[0]
        asker = Asker(f"{member.name} ({member.fingerprint[:16]}, {peer})", member.role, False)
        loop = asyncio.get_running_loop()
        told = await loop.run_in_executor(control.threads, control.answer, raw, asker)
        return await _respond(send, 200, told)

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
    """A socket that only this user opens; one that a killed server left gives way."""
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
            f"{path}: this socket cannot be made ({error.strerror or error}). Nothing was started; "
            "the server's folder must be on a file system of this machine, and writable."
        ) from None
    finally:
        os.umask(mask)
    return listener


async def _request(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> tuple[bytes, Asker | None] | None:
    """The line that somebody asks with, and who does; None when none came in time."""
    try:
        asker = _asker(writer.get_extra_info("socket"))
        async with asyncio.timeout(_ASK_S):
            return await reader.readline(), asker
    except (TimeoutError, ValueError, ConnectionError):  # ValueError: a line past the limit
        return None


async def _answer(
    control: Control,
    raw: bytes,
    asker: Asker | None,
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
) -> None:
    """Answers one line with one line."""
    if asker is None:
        told: dict[str, Any] = {
            "ok": False,
            "error": "TrustError",
            "message": "this user is not the server's, nor root. Nothing was done.",
        }
    else:
        gone = threading.Event()
        watching = asyncio.create_task(_watch(reader, gone))
        try:
            told = await asyncio.get_running_loop().run_in_executor(
                control.threads, control.answer, raw, asker, gone.is_set
            )
        finally:
            watching.cancel()
    with suppress(ConnectionError, TimeoutError):  # whoever asked did not wait
        writer.write(json.dumps(told).encode() + b"\n")
        async with asyncio.timeout(_ASK_S):
            await writer.drain()


async def _watch(reader: asyncio.StreamReader, gone: threading.Event) -> None:
    """Notes that the other end hangs up; nothing more is expected of it."""
    with suppress(ConnectionError):
        while await reader.read(MAX_REQUEST_BYTES):
            pass
    gone.set()


def _asker(connection: socket.socket) -> Asker | None:
    """Whoever is at the other end, as the kernel tells; None when it may not ask."""
    option = getattr(socket, "SO_PEERCRED", None)
    if option is None:  # not Linux: the socket's mode has let its owner in, and root
        return Asker(f"uid {os.getuid()}", "operator", True)
    raw = connection.getsockopt(socket.SOL_SOCKET, option, _CREDENTIALS.size)
    pid, uid, _ = _CREDENTIALS.unpack(raw)
    if uid not in (0, os.getuid()):
        return None
    try:
        name = pwd.getpwuid(uid).pw_name
    except KeyError:
        name = "unknown"
    return Asker(f"{name} (uid {uid}, pid {pid})", "operator", True)
