"""What a device's client for the Fleet API makes of answers over real connections."""

from __future__ import annotations

import ssl
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from flwr.proto.fleet_pb2 import PullMessagesRequest, PullMessagesResponse
from flwr.proto.message_pb2 import PullObjectRequest

from fedcore.errors import OwnerLimit
from fedcore.flower import fleet_pull
from fedcore.flower.fleet_pull import ANSWER_BYTES, BoundedClient
from fedcore.rpc import metered as metered_module
from fedcore.rpc.metered import TooLarge
from tests.unit.fedcore.rpc.serving import (
    Behave,
    answer_of,
    answering,
    bounded,
    contexts,
    endless,
)


@contextmanager
def calling(
    behave: Behave, folder: Path, *, stopped: Callable[[], bool] = lambda: False
) -> Iterator[tuple[BoundedClient, list[int]]]:
    """A client of a server that does as ``behave`` says, and what it counts of each call."""
    serving, trusting = contexts(folder)
    moved: list[int] = []
    with answering(behave, serving) as port:
        address = f"https://127.0.0.1:{port}"
        client = bounded(address, trusting, stopped=stopped, moved=moved.append)
        try:
            yield client, moved
        finally:
            client.close()


def test_an_honest_call_costs_little_beside_its_bytes(tmp_path: Path) -> None:
    content = PullMessagesResponse().SerializeToString()

    def behave(connection: Any, request: bytes) -> None:
        connection.sendall(answer_of(content))

    with calling(behave, tmp_path) as (client, moved):
        client.PullMessages(PullMessagesRequest())
        client.PullMessages(PullMessagesRequest())
    assert 1000 < moved[0] < 5000
    assert 0 < moved[1] < 1000


@pytest.mark.parametrize("declared", [b"", b"content-length: 0\r\n", b"content-length: x\r\n"])
def test_what_came_is_counted_whatever_was_declared_and_became_of_it(
    tmp_path: Path, declared: bytes
) -> None:
    def behave(connection: Any, request: bytes) -> None:
        endless(connection, b"HTTP/1.1 200 OK\r\n" + declared + b"\r\n", bytes(1 << 16))

    with calling(behave, tmp_path) as (client, moved):
        try:
            client.PullMessages(PullMessagesRequest())
        except (TooLarge, httpx.RemoteProtocolError):
            pass
        else:
            assert declared.startswith(b"content-length: 0")
    assert len(moved) == 1
    assert 1000 < moved[0] < 2 * ANSWER_BYTES


def test_what_comes_around_a_body_counts_against_the_owners_limit(tmp_path: Path) -> None:
    def behave(connection: Any, request: bytes) -> None:
        endless(connection, b"", b"HTTP/1.1 103 Early Hints\r\n\r\n" * 1000)

    with calling(behave, tmp_path) as (client, moved):
        with pytest.raises(OwnerLimit, match="including protocol overhead"):
            client.pull_object(PullObjectRequest(), 100_000)
        with pytest.raises(TooLarge):
            client.PullMessages(PullMessagesRequest())
    assert moved[0] < 400_000


MAX_PIECES = 2 * ANSWER_BYTES // metered_module.MIN_PIECE_BYTES


def by_records(connection: Any, request: bytes) -> None:
    """Each byte in a record of its own."""
    connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 99999\r\n\r\n")
    for _ in range(99_999):
        connection.sendall(b"z")


def by_chunks(connection: Any, request: bytes) -> None:
    head = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
    endless(connection, head, b"1\r\nz\r\n" * 1000)


@pytest.mark.parametrize("behave", [by_records, by_chunks])
def test_an_answer_that_is_cut_up_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, behave: Behave
) -> None:
    """It went through all parsers byte by byte: a second of a processor for each call."""
    handed_on = 0
    read = metered_module._Secured.read

    def counting(self: Any, *args: Any, **more: Any) -> bytes:
        nonlocal handed_on
        handed_on += 1
        return read(self, *args, **more)

    monkeypatch.setattr(metered_module._Secured, "read", counting)
    with (
        calling(behave, tmp_path) as (client, _),
        pytest.raises(TooLarge, match="pieces"),
    ):
        client.PullMessages(PullMessagesRequest())
    assert 0 < handed_on < MAX_PIECES


def test_no_more_comes_before_an_answer_than_headers_take(tmp_path: Path) -> None:
    """Each of the shortest interim answers takes a parser as long as a kilobyte of a body."""

    def behave(connection: Any, request: bytes) -> None:
        connection.sendall(b"HTTP/1.1 103 E\r\n\r\n" * 20_000 + answer_of(b""))

    with calling(behave, tmp_path) as (client, moved), pytest.raises(TooLarge):
        client.PullMessages(PullMessagesRequest())
    assert moved[0] < 200_000


def test_an_answer_that_drips_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet_pull, "LEAST_BYTES_PER_S", 10**6)

    def behave(connection: Any, request: bytes) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
        for _ in range(400):
            time.sleep(0.05)
            connection.sendall(b"z")

    with calling(behave, tmp_path) as (client, _):
        began = time.monotonic()
        with pytest.raises(httpx.ReadTimeout):
            client.PullMessages(PullMessagesRequest())
        assert 1.0 < time.monotonic() - began < 6.0


def test_a_process_that_ends_reads_no_object_to_its_end(tmp_path: Path) -> None:
    began = time.monotonic()

    def behave(connection: Any, request: bytes) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
        for _ in range(400):
            time.sleep(0.05)
            connection.sendall(b"z")

    def stopped() -> bool:
        return time.monotonic() - began > 0.5

    with (
        calling(behave, tmp_path, stopped=stopped) as (client, _),
        pytest.raises(httpx.ReadTimeout),
    ):
        client.pull_object(PullObjectRequest(), 10**9)
    assert time.monotonic() - began < 3.0


def test_every_connection_is_metered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of httpx, no public setting is used: this is what it must still have."""
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    client = bounded("https://127.0.0.1:1", ssl.create_default_context())
    transports = [client._client._transport, *client._client._mounts.values()]
    there = [one for one in transports if one is not None]
    inner: list[Any] = [one._inner for one in there if isinstance(one, metered_module._Metered)]
    assert len(inner) == len(there) > 1
    assert {type(one._pool._network_backend).__name__ for one in inner} == {"_Backend"}
    client.close()
