"""One connection whose peer sends requests and does not take the answers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from edge_client.serving import http_parts
from edge_client.serving.http_parts import (
    HttpAnswer,
    HttpRequest,
    InferenceConnection,
    InferenceHttpServer,
    Reply,
)

ASKED = b"GET /%d HTTP/1.1\r\nhost: localhost\r\n\r\n"


class Slow(asyncio.Transport):
    """Takes nothing until it is told to, and holds more than one byte to be too much."""

    def __init__(self, connection: InferenceConnection) -> None:
        super().__init__()
        self.connection, self.written, self.waiting = connection, b"", 0
        self.reads, self.closing, self.aborted = True, False, False

    def write(self, data: Any) -> None:
        before, self.waiting = self.waiting, self.waiting + len(data)
        self.written += data
        if not before:
            self.connection.pause_writing()

    def taken(self) -> None:
        self.waiting = 0
        self.connection.resume_writing()

    def get_write_buffer_size(self) -> int:
        return self.waiting

    def pause_reading(self) -> None:
        self.reads = False

    def resume_reading(self) -> None:
        self.reads = True

    def is_closing(self) -> bool:
        return self.closing

    def close(self) -> None:
        self.closing = True

    def abort(self) -> None:
        self.aborted = True
        self.connection.connection_lost(None)


def over_slow(act: Callable[[Slow, list[str]], Any]) -> None:
    """Runs ``act`` with a connection and the paths that were handled."""

    async def main() -> None:
        handled: list[str] = []

        def handler(request: HttpRequest, reply: Reply) -> None:
            handled.append(request.path)
            reply(HttpAnswer(200, request.path.encode()))

        server = InferenceHttpServer(handler, lambda: None, max_body_bytes=1000)
        connection = server.protocol()
        slow = Slow(connection)
        connection.connection_made(slow)
        await act(slow, handled)
        if not slow.aborted:
            slow.abort()
        assert (server.connections, server.held_bytes) == (set(), 0)

    asyncio.run(main())


def test_no_request_is_read_while_an_answer_waits() -> None:
    async def act(slow: Slow, handled: list[str]) -> None:
        for number in range(5):  # each in data of its own
            slow.connection.data_received(ASKED % number)
        assert handled == ["/0"]
        assert not slow.reads
        for number in range(1, 6):
            slow.taken()
            await asyncio.sleep(0)
            # The four that had come are one piece of data now: all after the first are not read.
            assert handled == [f"/{each}" for each in range(min(number, 1) + 1)]
        assert slow.closing

    over_slow(act)


def test_what_came_before_is_read_before_what_comes_after() -> None:
    async def act(slow: Slow, handled: list[str]) -> None:
        slow.connection.data_received(ASKED % 0)
        slow.connection.data_received((ASKED % 1)[:9])
        slow.taken()
        slow.connection.data_received((ASKED % 1)[9:])  # before the loop has come round
        await asyncio.sleep(0)
        assert handled == ["/0", "/1"]

    over_slow(act)


@pytest.mark.parametrize("asked", [ASKED % 1, b"GET / HTTP/1.0\r\n\r\n", b"garbage\r\n\r\n"])
def test_an_answer_that_is_not_taken_ends_the_connection(
    monkeypatch: pytest.MonkeyPatch, asked: bytes
) -> None:
    """Also one that closes the connection once it has been taken."""
    monkeypatch.setattr(http_parts, "_TAKE_S", 0.001)

    async def act(slow: Slow, handled: list[str]) -> None:
        slow.connection.data_received(asked)
        async with asyncio.timeout(20):
            while not slow.aborted:
                await asyncio.sleep(0.001)
        ended.append(slow.aborted)

    ended: list[bool] = []
    over_slow(act)
    assert ended == [True]


def test_bodies_of_all_connections_share_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_parts, "_HELD_BYTES", 1500)

    async def act(slow: Slow, handled: list[str]) -> None:
        other = slow.connection._server.protocol()
        second = Slow(other)
        other.connection_made(second)
        begun = b"POST / HTTP/1.1\r\nhost: localhost\r\ncontent-length: 1000\r\n\r\n" + bytes(900)
        slow.connection.data_received(begun)
        other.data_received(begun)
        assert slow.written == b""
        assert second.written.startswith(b"HTTP/1.1 503 ")
        second.abort()

    over_slow(act)


def test_many_short_headers_cost_no_more_than_their_length() -> None:
    async def act(slow: Slow, handled: list[str]) -> None:
        slow.connection.data_received(b"GET / HTTP/1.1\r\n" + b"x:\r\n" * 100_000)
        assert slow.written.startswith(b"HTTP/1.1 431 ")

    over_slow(act)
