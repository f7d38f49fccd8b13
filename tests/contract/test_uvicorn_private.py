"""What the server uses of uvicorn that is nobody's API, over real sockets."""

from __future__ import annotations

import asyncio
import inspect
import signal
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

import server
from server.live.network.peer import PeerProtocol
from server.live.network.uvicorn_parts import HttpConnection, HttpServer

App = Callable[[Any, Any, Any], Any]
SLOW_S = 10.0


class Seen(HttpConnection):
    """Keeps each connection, to look at it from outside."""

    def __init__(self, *arguments: Any, made: list[Seen], **named: Any) -> None:
        super().__init__(*arguments, **named)
        made.append(self)


@asynccontextmanager
async def serving(app: App) -> AsyncIterator[tuple[HttpServer, list[Seen], tuple[str, int]]]:
    """A server on loopback, its connections, and its address."""
    made: list[Seen] = []
    config = uvicorn.Config(
        app,
        http=cast("type[asyncio.Protocol]", partial(Seen, made=made)),
        log_config=None,
        lifespan="off",
        ws="none",
        timeout_graceful_shutdown=1,
    )
    http = HttpServer(config)
    listener = socket.create_server(("127.0.0.1", 0))
    task = asyncio.create_task(http.serve(sockets=[listener]))
    while not http.started:
        await asyncio.sleep(0.01)
    try:
        yield http, made, listener.getsockname()
    finally:
        http.should_exit = True
        await asyncio.wait_for(task, SLOW_S)
        listener.close()


async def answer(send: Any, data: bytes) -> None:
    headers = [(b"content-length", b"%d" % len(data))]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": data})


def request(path: bytes = b"/", body: bytes = b"") -> bytes:
    return b"POST %s HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n%s" % (path, len(body), body)


def test_a_request_in_progress_and_those_ahead_of_it_are_counted() -> None:
    async def main() -> None:
        found: list[tuple[bool, int]] = []

        async def app(scope: Any, receive: Any, send: Any) -> None:
            while scope["path"] == "/1" and made[0].requests_ahead() < 2:
                await asyncio.sleep(0.01)
            found.append((made[0].busy(), made[0].requests_ahead()))
            await answer(send, b"ok")

        async with serving(app) as (_, made, address):
            reader, writer = await asyncio.open_connection(*address)
            writer.write(request(b"/1") + request(b"/2") + request(b"/3"))
            for _ in range(3):
                await asyncio.wait_for(reader.readuntil(b"ok"), SLOW_S)
            assert not made[0].busy()
            writer.close()
        assert found == [(True, 2), (True, 1), (True, 0)]

    asyncio.run(main())


def test_what_is_shared_reaches_the_application_until_it_is_taken_back() -> None:
    async def main() -> None:
        states: list[dict[str, Any]] = []

        async def app(scope: Any, receive: Any, send: Any) -> None:
            states.append(dict(scope["state"]))
            made[0].share_nothing()
            await answer(send, b"ok")

        async with serving(app) as (_, made, address):
            reader, writer = await asyncio.open_connection(*address)
            while not made:
                await asyncio.sleep(0.01)
            made[0].share({"key": b"public"})
            for _ in range(2):
                writer.write(request())
                await asyncio.wait_for(reader.readuntil(b"ok"), SLOW_S)
            writer.close()
        assert states == [{"key": b"public"}, {}]

    asyncio.run(main())


def test_a_body_is_taken_over_once_and_the_connection_goes_on_after_it() -> None:
    """The rest of the body bypasses the parser; the next request is parsed as usual."""

    async def main() -> None:
        taken: list[bytes | None] = []
        raw: list[bytes] = []
        rest = b"x" * 7

        async def app(scope: Any, receive: Any, send: Any) -> None:
            if scope["path"] != "/big":
                await answer(send, (await receive())["body"])
                return
            connection = made[0]
            while not connection.cycle.body:
                await asyncio.sleep(0.01)
            taken.append(connection.take_body({}))  # another request's scope
            taken.append(connection.take_body(scope))
            arrived = asyncio.Event()

            def receive_rest(data: bytes) -> None:
                raw.append(data)
                del connection.data_received  # type: ignore[attr-defined]
                connection.end_body()
                arrived.set()

            connection.data_received = receive_rest  # type: ignore[method-assign]
            writer.write(rest)
            await asyncio.wait_for(arrived.wait(), SLOW_S)
            taken.append(connection.take_body(scope))  # all of it has arrived
            await answer(send, b"ok")

        async with serving(app) as (_, made, address):
            reader, writer = await asyncio.open_connection(*address)
            writer.write(request(b"/big", b"y" * 10 + rest)[: -len(rest)])
            await asyncio.wait_for(reader.readuntil(b"ok"), SLOW_S)
            writer.write(request(b"/next", b"next"))
            await asyncio.wait_for(reader.readuntil(b"next"), SLOW_S)
            writer.close()
        assert taken == [None, b"y" * 10, None]
        assert raw == [rest]

    asyncio.run(main())


def test_a_head_leaves_with_its_body() -> None:
    async def main() -> None:
        sent: list[bytes] = []

        async def app(scope: Any, receive: Any, send: Any) -> None:
            transport = made[0].transport
            write = transport.write
            transport.write = lambda data: (sent.append(bytes(data)), write(data))[1]  # type: ignore[method-assign,assignment]
            await answer(send, b"body")

        async with serving(app) as (_, made, address):
            reader, writer = await asyncio.open_connection(*address)
            writer.write(request())
            await asyncio.wait_for(reader.readuntil(b"body"), SLOW_S)
            writer.close()
        (whole,) = sent
        assert whole.startswith(b"HTTP/1.1 200 OK\r\n")
        assert whole.endswith(b"\r\n\r\nbody")

    asyncio.run(main())


def test_the_server_takes_no_signals_and_leaves_no_connection() -> None:
    async def main() -> None:
        before = [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)]

        async def app(scope: Any, receive: Any, send: Any) -> None:
            await asyncio.sleep(10 * SLOW_S)

        async with serving(app) as (http, made, address):
            assert [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)] == before
            reader, writer = await asyncio.open_connection(*address)
            writer.write(request())
            while not (made and made[0].busy()):
                await asyncio.sleep(0.01)
            assert http.server_state.connections == set(made)
        assert await asyncio.wait_for(reader.read(), SLOW_S) == b""
        writer.close()

    asyncio.run(main())


def test_the_callbacks_that_are_extended_are_uvicorns() -> None:
    """One that uvicorn no longer calls would be dead code, and a limit without effect."""
    extended = {
        "connection_made": 1,
        "connection_lost": 1,
        "data_received": 1,
        "pause_writing": 0,
        "resume_writing": 0,
        "on_headers_complete": 0,
        "on_body": 1,
        "on_message_complete": 0,
        "on_response_complete": 0,
        "send_400_response": 1,
        "shutdown": 0,
    }
    ours = {name for kind in (PeerProtocol, HttpConnection) for name in vars(kind)}
    assert ours & {name for name in dir(HttpToolsProtocol) if not name.startswith("__")} == set(
        extended
    )
    for name, arguments in extended.items():
        parameters = inspect.signature(getattr(HttpToolsProtocol, name)).parameters
        assert len(parameters) == arguments + 1, name  # and self


def test_one_file_names_what_is_private() -> None:
    private = ("uvicorn.protocols", "server_state", ".cycle", ".pipeline", ".app_state", ".flow.")
    found = {
        path.name
        for path in Path(server.__file__).parent.rglob("*.py")
        if any(name in path.read_text() for name in private) and "uvicorn" in path.read_text()
    }
    assert found == {"uvicorn_parts.py"}
