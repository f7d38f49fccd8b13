"""Options that several commands of the server share."""

from __future__ import annotations

import pytest

from fedcore.errors import ConfigError
from server.options import listen_address


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("0.0.0.0:9092", ("0.0.0.0", 9092)),
        ("[::1]:19124", ("::1", 19124)),
        ("localhost:0", ("localhost", 0)),
        ("a:65535", ("a", 65535)),
    ],
)
def test_an_address_is_a_host_and_a_port(text: str, address: tuple[str, int]) -> None:
    assert listen_address(text) == address


@pytest.mark.parametrize(
    "text",
    [
        "9092",
        ":0",
        "[]:0",
        "a:",
        "a:b",
        "a:-1",
        "a:65536",
        "a:\u00b2",
        "a:\u0663",
        "a:" + "9" * 5000,
    ],
)
def test_what_is_no_address_is_said_so(text: str) -> None:
    with pytest.raises(ConfigError, match="expected HOST:PORT"):
        listen_address(text)
