"""What the gate answers, and what it tells of that."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from server.live.network.gate import Gate
from server.live.network.limits import Refusals
from server.live.network.peer import PUBLIC_KEY


def gate(*, member: bool = True, wait_s: float = 0.0) -> Gate:
    one = SimpleNamespace(name="edge-0", role="device", public=b"\x01" * 65)
    parts: dict[str, Any] = {
        "fleet": None,
        "roster": SimpleNamespace(member=lambda public: one if member else None),
        "presence": None,
        "uploads": None,
        "rates": SimpleNamespace(wait_s=lambda node, calls: wait_s),
        "limits": None,
        "hello": None,
        "spool": Path(),
        "bodies": None,
        "wake_port": 1,
        "refusals": Refusals(),
    }
    return Gate(**parts)


def status(gate: Gate, method: str, path: str) -> int:
    sent: list[dict[str, Any]] = []

    async def send(event: Any) -> None:
        sent.append(event)

    async def receive() -> Any:
        return {"type": "http.request", "body": b""}

    scope = {
        "type": "http",
        "method": method,
        "path": path,
        "headers": [],
        "state": {PUBLIC_KEY: b"\x01" * 65},
    }
    asyncio.run(gate(scope, receive, send))
    return cast("int", sent[0]["status"])


def test_a_device_that_asks_for_nothing_is_answered_without_a_word(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """`fedcore doctor --kit` asks so."""
    assert status(gate(), "GET", "/") == 200
    assert not caplog.records


@pytest.mark.parametrize(
    ("method", "path", "made", "code"),
    [
        ("POST", "/", {}, 404),
        ("GET", "/docs", {}, 404),
        ("GET", "/", {"member": False}, 403),
        ("GET", "/", {"wait_s": 1.0}, 429),
    ],
    ids=["posted", "elsewhere", "no member", "too often"],
)
def test_whatever_else_is_refused_and_told(
    method: str, path: str, made: dict[str, Any], code: int, caplog: pytest.LogCaptureFixture
) -> None:
    assert status(gate(**made), method, path) == code
    assert f": {code}: {path}: " in caplog.text
