"""Who gives way where connections are too many, and who took too long."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import uvicorn

from server.live.network.body import Buffers
from server.live.network.connections import Connections
from server.live.network.limits import Limits, Refusals
from server.live.network.peer import PeerProtocol

LIMITS = Limits(connections_each=3, half_open=4, handshake_s=10.0, headers_s=20.0, body_s=30.0)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        self.now += 0.001  # so that an order shows
        return self.now


@dataclass
class Someone:
    public: bytes
    working: bool = False
    seen: float = 0.0
    due: float | None = None
    stuck: float | None = None
    ended: bool = False

    def busy(self) -> bool:
        return self.working

    def drop(self) -> None:
        self.ended = True


class Door:
    """Connections of which a test holds the other ends."""

    def __init__(self, most: int = 100) -> None:
        self.clock = Clock()
        self.connections = Connections(
            LIMITS, Refusals(), max_connections=most, name_of=lambda public: None, clock=self.clock
        )
        self.ends: list[socket.socket] = []

    def half(self, address: str) -> tuple[socket.socket, socket.socket]:
        """One that shakes hands: the server's end and the stranger's."""
        ours, theirs = socket.socketpair()
        self.ends += [ours, theirs]
        theirs.setblocking(False)
        self.connections.accepted(ours, address)
        return ours, theirs

    def whole(self, key: bytes, *, working: bool = False) -> Someone:
        ours, _ = self.half("10.0.0.1")
        someone = Someone(key, working)
        self.connections.handshake_done(ours.fileno(), someone)
        return someone


def hung_up(theirs: socket.socket) -> bool:
    try:
        return theirs.recv(1) == b""
    except BlockingIOError:
        return False


@pytest.fixture
def door() -> Iterator[Door]:
    door = Door()
    yield door
    for end in door.ends:
        end.close()


def test_whose_address_has_the_most_half_open_gives_way(door: Door) -> None:
    honest, _ = door.half("10.0.0.1")
    crowd = [door.half(f"2001:db8::{number}") for number in range(2)]  # one network, two hosts
    assert door.connections.has_room()
    crowd.append(door.half("2001:db8::ffff"))
    assert not door.connections.has_room()
    assert [hung_up(theirs) for _, theirs in crowd] == [True, False, False]
    assert not door.connections.has_room(), "its descriptor is not free yet"
    assert [hung_up(theirs) for _, theirs in crowd[1:]] == [False, False], "and nobody else pays"
    door.connections.closed(crowd[0][0].fileno())
    assert door.connections.has_room()
    assert len(door.connections) == 3
    door.connections.closed(honest.fileno())


def test_addresses_of_ipv4_within_ipv6_are_told_apart(door: Door) -> None:
    first = [door.half(f"::ffff:10.0.0.{number}") for number in (1, 2, 2, 2)]
    assert not door.connections.has_room()
    assert [hung_up(theirs) for _, theirs in first] == [False, True, False, False]


def test_who_has_the_most_connections_gives_way_where_all_are_taken() -> None:
    door = Door(most=8)
    try:
        modest = [door.whole(b"modest") for _ in range(2)]
        greedy = [door.whole(b"greedy", working=number == 0) for number in range(3)]
        others = [door.whole(b"other%d" % number) for number in range(3)]
        assert not door.connections.has_room()
        ended = [one.ended for one in (*modest, *greedy, *others)]
        assert ended == [False, False, False, True, False, False, False, False], "the idlest of it"
    finally:
        for end in door.ends:
            end.close()


def test_one_more_than_an_identity_may_have_ends_its_idlest(door: Door) -> None:
    own = [door.whole(b"key", working=number == 0) for number in range(4)]
    other = door.whole(b"other")
    assert [one.ended for one in (*own, other)] == [False, True, False, False, False]


def test_each_has_its_time(door: Door) -> None:
    _, mute = door.half("10.0.0.9")
    silent, stuck, calling, stranger = (
        door.whole(b"silent"),
        door.whole(b"stuck"),
        door.whole(b"calling", working=True),
        door.whole(b"stranger"),
    )
    stuck.due, calling.due, stuck.stuck = None, None, door.clock()
    members = {b"silent", b"stuck", b"calling"}
    ended = []
    for passed in (2.0, 2.0, 7.0, 10.0, 10.0):
        door.clock.now += passed
        door.connections.sweep(members)
        ended.append([hung_up(mute), stranger.ended, silent.ended, stuck.ended, calling.ended])
    assert ended == [
        [False, False, False, False, False],
        [False, True, False, False, False],
        [True, True, False, False, False],
        [True, True, True, False, False],
        [True, True, True, True, False],
    ]


def test_a_peer_that_takes_no_answer_has_so_long_and_its_room_is_free_again(door: Door) -> None:
    """Over real sockets, known from the acceptance to the end."""

    async def answer(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": bytes(2**24)})

    async def main() -> list[int]:
        config = uvicorn.Config(answer, log_config=None, lifespan="off")
        config.load()
        made = partial(
            PeerProtocol,
            config=config,
            server_state=uvicorn.Server(config).server_state,
            app_state={},
            connections=door.connections,
            buffers=Buffers(),
        )
        plain = socket.create_server(("127.0.0.1", 0))
        address, listener = plain.getsockname(), door.connections.listener(plain)
        server = await asyncio.get_running_loop().create_server(made, sock=listener)
        found = []
        with closing(socket.create_connection(address)) as deaf:
            deaf.sendall(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
            for passed in (0.0, LIMITS.body_s - 5, 10.0):
                await asyncio.sleep(0.2)
                door.clock.now += passed
                door.connections.sweep({b""})
                await asyncio.sleep(0.2)
                found.append(len(door.connections))
        server.close()
        return found

    assert asyncio.run(main()) == [1, 1, 0]


def test_as_many_files_are_asked_for_as_the_system_grants() -> None:
    code = (
        "from resource import RLIMIT_NOFILE, getrlimit, setrlimit\n"
        "from server.live.network.connections import grant_descriptors\n"
        "for hard in 10_000, 1024, 200:\n"
        "    setrlimit(RLIMIT_NOFILE, (100, hard))\n"
        "    print(grant_descriptors(), *getrlimit(RLIMIT_NOFILE))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["3248 10000 10000", "256 1024 1024", "50 200 200"]
