"""Room for new connections, whoever has opened the others."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from fedcore.rpc.crowd import SWEEP_S, Crowd, _largest_first, address_of, plain_address


class Port:
    """A port of this process, and connections to it from addresses of this machine."""

    def __init__(self, stack: ExitStack) -> None:
        self.stack = stack
        self.listening = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=100))
        self.number = self.listening.getsockname()[1]

    def dial(self, source: str) -> socket.socket:
        one = self.stack.enter_context(
            socket.create_connection(("127.0.0.1", self.number), 10, source_address=(source, 0))
        )
        self.stack.enter_context(self.listening.accept()[0])
        return one


@pytest.fixture
def port() -> Iterator[Port]:
    with ExitStack() as stack:
        yield Port(stack)


def ended(connection: socket.socket) -> bool:
    connection.setblocking(False)
    try:
        return connection.recv(1) == b""
    except BlockingIOError:
        return False


def test_the_oldest_idle_ones_of_the_address_with_the_most_are_shut_down(port: Port) -> None:
    now = [0.0]
    crowd = Crowd(port.number, most=16, clock=lambda: now[0])
    with ExitStack() as stack:
        elsewhere = Port(stack)
        others = [elsewhere.dial("127.0.0.2") for _ in range(9)]
        first = [port.dial("127.0.0.2") for _ in range(3)]
        honest = [port.dial("127.0.0.3") for _ in range(2)]
        assert crowd.sweep(()) == 1, "a quarter of 16 may be without a call"
        assert [ended(one) for one in first] == [True, False, False]
        now[0] += SWEEP_S
        later = [port.dial("127.0.0.2") for _ in range(3)]
        busy = {plain_address(first[1].getsockname())}
        first[0].close()
        assert crowd.sweep(busy) == 2
        assert ended(first[2])
        assert sum(map(ended, later)) == 1
        assert not any(map(ended, (*honest, first[1], *others)))
        assert crowd.sweep(busy) == 0, "it was looked at just now"


def test_calls_that_take_most_of_the_room_leave_half_of_the_rest(port: Port) -> None:
    crowd = Crowd(port.number, most=16)
    calling = [port.dial("127.0.0.2") for _ in range(12)]
    idle = [port.dial("127.0.0.3") for _ in range(4)]
    assert crowd.sweep({plain_address(one.getsockname()) for one in calling}) == 2
    assert not any(map(ended, calling))
    assert sum(map(ended, idle)) == 2


def test_where_few_files_are_open_nothing_is_looked_at(port: Port) -> None:
    one = [port.dial("127.0.0.2") for _ in range(6)]
    assert Crowd(port.number, most=16).sweep((), others=10**6) == 0
    assert not any(map(ended, one))


def test_the_largest_group_gives_its_oldest_first() -> None:
    ours, theirs = "10.0.0.1", "2001:db8::"
    oldest_first = [(ours, 1), (f"{theirs}1", 1), (f"{theirs}2", 1), (f"{theirs}3", 1), (ours, 2)]
    chosen = _largest_first(oldest_first, 4)
    assert chosen[0] == (f"{theirs}1", 1), "addresses of one network count together"
    assert set(chosen[1:3]) == {(ours, 1), (f"{theirs}2", 1)}
    assert sorted(_largest_first(oldest_first, 99)) == sorted(oldest_first)
    assert _largest_first(oldest_first, -1) == []


@pytest.mark.parametrize(
    ("peer", "address"),
    [
        ("ipv4:10.0.0.1:443", ("10.0.0.1", 443)),
        ("ipv6:%5B::1%5D:443", ("::1", 443)),
        ("ipv6:[2001:DB8::1]:443", ("2001:db8::1", 443)),
        ("ipv6:%5B::ffff:10.0.0.1%5D:443", ("10.0.0.1", 443)),
        ("unix:/run/x", ("unix:/run/x", 0)),
        ("", ("", 0)),
    ],
)
def test_addresses_of_grpc_are_those_of_sockets(peer: str, address: tuple[str, int]) -> None:
    assert address_of(peer) == address
