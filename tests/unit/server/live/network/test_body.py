"""Bodies that go elsewhere as they come in over TLS, with what comes before and after them."""

from __future__ import annotations

import asyncio
import random
import re
import socket
import ssl
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from typing import Any

import pytest
import uvicorn

from fedcore.crypto.certificates import pem
from fedcore.crypto.issue import issue_authority, issue_server
from fedcore.crypto.keys import new_key, save_key
from server.live.network.body import Buffers
from server.live.network.connections import Connections
from server.live.network.limits import Limits, Refusals
from server.live.network.peer import PeerProtocol, divert_of

SIZE = 3_000_017
BODY = random.Random(0).randbytes(SIZE)
Client = Callable[[ssl.SSLSocket], Any]


@pytest.fixture(scope="module")
def contexts(tmp_path_factory: pytest.TempPathFactory) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    folder, key, own, now = tmp_path_factory.mktemp("tls"), new_key(), new_key(), datetime.now(UTC)
    authority = issue_authority(key, project="p", now=now)
    certificate = issue_server(
        own.public_key(), hosts=["localhost"], authority=authority, authority_key=key, now=now
    )
    save_key(folder / "key.pem", own)
    (folder / "chain.pem").write_bytes(pem(certificate))
    taking = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    taking.load_cert_chain(folder / "chain.pem", folder / "key.pem")
    giving = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    giving.load_verify_locations(cadata=pem(authority).decode())
    return taking, giving


class App:
    """Sends each body to a sink, as the gate does, and answers with how long it was."""

    def __init__(self, *, fails_at: int = SIZE + 1) -> None:
        self.fails_at = fails_at
        self.bodies: list[bytearray] = []
        self.pieces: list[int] = []
        self.errors: list[Exception] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        event = await receive()
        taken = bytearray(event.get("body", b""))
        self.bodies.append(taken)

        def sink(piece: bytes | memoryview) -> None:
            taken.extend(piece)
            self.pieces.append(len(piece))
            if len(taken) >= self.fails_at:
                self.fails_at = SIZE + 1
                raise ValueError("enough")

        length = int(dict(scope["headers"])[b"content-length"])
        divert = divert_of(scope["state"])
        assert divert is not None
        try:
            if ended := event["more_body"] and divert(scope, sink, length - len(taken)):
                await ended
        except (ValueError, ConnectionResetError) as error:
            self.errors.append(error)
        body = b"%d" % len(taken)
        headers = [(b"content-length", b"%d" % len(body))]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})


def served(app: App, contexts: tuple[ssl.SSLContext, ssl.SSLContext], *clients: Client) -> Any:
    """What each of the clients gives back, all at once against one server."""
    taking, giving = contexts

    async def main() -> list[Any]:
        config = uvicorn.Config(app, log_config=None, lifespan="off")
        config.load()
        known = Connections(Limits(), Refusals(), max_connections=100, name_of=lambda key: None)
        made = partial(
            PeerProtocol,
            config=config,
            server_state=uvicorn.Server(config).server_state,
            app_state={},
            connections=known,
            buffers=Buffers(),
        )
        plain = socket.create_server(("127.0.0.1", 0))
        address, listener = plain.getsockname(), known.listener(plain)
        server = await asyncio.get_running_loop().create_server(made, sock=listener, ssl=taking)

        def call(client: Client) -> Any:
            with (
                socket.create_connection(address, 10.0) as one,
                giving.wrap_socket(one, server_hostname="localhost") as secure,
            ):
                return client(secure)

        found = await asyncio.gather(*(asyncio.to_thread(call, each) for each in clients))
        await asyncio.sleep(0.1)
        server.close()
        return found

    return asyncio.run(main())


def head(size: int) -> bytes:
    return b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % size


def answers(secure: ssl.SSLSocket, count: int) -> list[int]:
    """The numbers that so many answers hold."""
    raw = b""
    while len(
        found := re.findall(rb"content-length: (\d+).*?\r\n\r\n(\d+)", raw, re.S)
    ) < count or (len(found[-1][1]) < int(found[-1][0])):
        raw += secure.recv(1000)
    return [int(number) for _, number in found]


@pytest.mark.parametrize("step", [10_007, 2**16, 2 * SIZE])
def test_a_body_is_what_was_sent_and_a_call_may_follow_at_once(
    contexts: tuple[ssl.SSLContext, ssl.SSLContext], step: int
) -> None:
    app, other = App(), BODY[::-1]

    def push(body: bytes, secure: ssl.SSLSocket) -> list[int]:
        raw = head(len(body)) + body + head(5) + b"small"
        for place in range(0, len(raw), step):
            secure.sendall(raw[place : place + step])
        return answers(secure, 2)

    both = served(app, contexts, partial(push, BODY), partial(push, other))
    assert both == [[SIZE, 5], [SIZE, 5]]
    assert sorted(app.bodies) == sorted([BODY, other, b"small", b"small"])
    assert not app.errors
    assert max(app.pieces) <= 2**20 + 2**14


def test_what_is_left_of_a_body_that_was_refused_is_passed_over(
    contexts: tuple[ssl.SSLContext, ssl.SSLContext],
) -> None:
    app = App(fails_at=SIZE // 2)

    def push(secure: ssl.SSLSocket) -> list[int]:
        secure.sendall(head(SIZE) + BODY)
        secure.sendall(head(SIZE) + BODY)
        return answers(secure, 2)

    ((refused, taken),) = served(app, contexts, push)
    assert SIZE // 2 <= refused < SIZE == taken
    assert [str(error) for error in app.errors] == ["enough"]


@pytest.mark.parametrize("says_goodbye", [False, True])
def test_a_peer_that_goes_away_in_a_body_is_told_of(
    contexts: tuple[ssl.SSLContext, ssl.SSLContext], says_goodbye: bool
) -> None:
    app = App()

    def push(secure: ssl.SSLSocket) -> None:
        secure.sendall(head(SIZE) + BODY[: SIZE // 2])
        if says_goodbye:
            with suppress(OSError):  # the server hangs up in turn
                secure.unwrap()

    served(app, contexts, push)
    assert [type(error) for error in app.errors] == [ConnectionResetError]
    assert BODY.startswith(app.bodies[0])


def test_bytes_that_are_no_tls_end_the_connection(
    contexts: tuple[ssl.SSLContext, ssl.SSLContext],
) -> None:
    app = App()

    def push(secure: ssl.SSLSocket) -> bytes:
        secure.sendall(head(SIZE) + BODY[: SIZE // 2])
        with (
            socket.socket(fileno=socket.dup(secure.fileno())) as plain,
            suppress(ConnectionError),  # hung up, or not even that
        ):
            plain.settimeout(10.0)
            plain.sendall(bytes(SIZE))
            while plain.recv(2**16):
                pass
        return b"over"

    assert served(app, contexts, push) == [b"over"]
    assert [type(error) for error in app.errors] == [ConnectionResetError]
    assert BODY.startswith(app.bodies[0])
