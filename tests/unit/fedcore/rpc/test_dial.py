"""A name that has many addresses: none of them takes the time of all."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack

import httpcore
import pytest

from fedcore.rpc.dial import dial
from fedcore.rpc.metered import Meter, Traffic, _Backend
from fedcore.rpc.relay import relayed

NAME = "fl.example.org"


def swallowing() -> Iterator[socket.socket]:
    """Listeners whose queue is full: what asks for a connection there hears nothing."""
    with ExitStack() as all_of_them:
        while True:
            listener = all_of_them.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
            for _ in range(2):
                filling = all_of_them.enter_context(socket.socket())
                filling.setblocking(False)
                filling.connect_ex(listener.getsockname())
            yield listener


def resolve(monkeypatch: pytest.MonkeyPatch, addresses: list[tuple[str, int]]) -> None:
    """Has `NAME` stand for these."""
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", address) for address in addresses]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **more: found)


def test_addresses_that_swallow_what_comes_take_no_longer_than_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whoever answers for the name could hold a device for days: with thousands, 90 s each."""
    endless = swallowing()
    resolve(monkeypatch, [next(endless).getsockname() for _ in range(6)])
    meter, began_s = Meter(), time.monotonic()
    with (
        meter.counted(Traffic(1 << 20, began_s + 1.0, lambda: False)),
        pytest.raises(httpcore.ConnectTimeout),
    ):
        _Backend(meter).connect_tcp(NAME, 1)
    assert time.monotonic() - began_s < 3.0
    began_s = time.monotonic()
    with (
        pytest.raises(OSError, match="time"),
        relayed(NAME, 1, proxy=None, timeout_s=1.0, took=lambda count: None),
    ):
        raise AssertionError("nobody is there")
    assert time.monotonic() - began_s < 3.0


def test_an_address_that_swallows_what_comes_leaves_time_for_the_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as there:
        endless = swallowing()
        resolve(monkeypatch, [next(endless).getsockname(), there.getsockname()])
        with dial(NAME, 1, 1.0) as connection:
            assert connection.getpeername() == there.getsockname()


def test_of_thousands_of_addresses_few_are_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        nobody = closed.getsockname()
    with socket.create_server(("127.0.0.1", 0)) as there:
        resolve(monkeypatch, [*[nobody] * 5000, there.getsockname()])
        with pytest.raises(ConnectionRefusedError):
            dial(NAME, 1, 1.0)


def test_a_family_that_the_system_lacks_leaves_the_next_address(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = listener.getsockname()
        families = (socket.AF_UNSPEC, socket.AF_INET)  # no system makes a socket of the first
        found = [(family, socket.SOCK_STREAM, 6, "", address) for family in families]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **more: found)
        with dial(NAME, 1, 2.0) as connection:
            assert connection.getpeername() == address
