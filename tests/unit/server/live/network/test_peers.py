"""Devices by the names that they were enrolled under, whatever they say of themselves."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest

from server.live.network.limits import Refusals
from server.live.network.signatures import DevicePeers


@pytest.fixture
def peers() -> DevicePeers:
    members = {b"0": SimpleNamespace(name="edge-0"), b"1": SimpleNamespace(name="a\x1b[31m\nb")}
    roster: Any = SimpleNamespace(member=members.get)
    keys = {10: b"0", 11: b"1", 12: b"gone"}
    return DevicePeers(roster, keys.get, Refusals())


def test_a_device_is_called_by_its_name_and_one_that_left_by_its_node(peers: DevicePeers) -> None:
    assert [peers.name(node) for node in (10, 12, 99)] == ["client 'edge-0'", "node 12", "node 99"]
    assert peers.name(11).isprintable()


def test_what_a_device_says_stands_behind_its_own_name(peers: DevicePeers) -> None:
    assert peers.failure_text(10, "no data") == "client 'edge-0': no data"
    assert peers.failure_text(10, "client 'edge-0': no data") == "client 'edge-0': no data"
    assert (
        peers.failure_text(10, "client 'edge-9': lied") == "client 'edge-0': client 'edge-9': lied"
    )


def test_what_is_refused_is_a_line_of_the_log_once_in_a_while(
    peers: DevicePeers, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        for _ in range(1000):
            peers.rejected(10, "its loss is 1e300")
    assert caplog.messages == ["refused client 'edge-0': 409: its loss is 1e300"]
