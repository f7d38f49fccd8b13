"""What the gate answers, and what it tells of that."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from fedcore.flower.fleet_api import Caller
from fedcore.flower.fleet_bundle import PUSH_BUNDLE
from fedcore.rpc.bundle_pb2 import Bundle
from server.live.network import gate as network_gate
from server.live.network.gate import Gate
from server.live.network.limits import Limits, Rates, Refusals
from server.live.network.peer import PUBLIC_KEY


def gate(
    *, member: bool = True, wait_s: float = 0.0, rates: Rates | None = None, presence: Any = None
) -> Gate:
    one = SimpleNamespace(name="edge-0", role="device", public=b"\x01" * 65)
    parts: dict[str, Any] = {
        "fleet": None,
        "roster": SimpleNamespace(member=lambda public: one if member else None),
        "presence": presence,
        "uploads": None,
        "rates": rates or SimpleNamespace(wait_s=lambda node, calls: wait_s),
        "limits": Limits(),
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


@pytest.mark.parametrize("size_bytes", [1, 1000])
def test_a_bundle_is_admitted_at_the_time_that_its_refusal_named(
    monkeypatch: pytest.MonkeyPatch, size_bytes: int
) -> None:
    """Each attempt pays for the call and for its bytes before its objects are counted."""
    monkeypatch.setattr(network_gate, "upload_of", lambda *_: None)
    now, limits = [0.0], Limits()
    rates = Rates(limits, lambda node_id: 0, lambda: now[0])
    guard = gate(rates=rates)
    caller = Caller(1, b"", "edge-0")
    body = Bundle(objects=[b"x" * size_bytes] * 60).SerializeToString()

    def push() -> float | None:
        try:
            guard._check_rate(caller.node_id)
            asyncio.run(guard._admit(caller, PUSH_BUNDLE, body))
        except network_gate._Refusal as refusal:
            return refusal.retry_after_s
        return None

    assert push() is None
    while (wait_s := push()) is None:
        pass
    now[0] += wait_s + 1e-6
    assert push() is None


def test_a_reason_for_leaving_is_kept_short_and_fit_to_print(
    caplog: pytest.LogCaptureFixture,
) -> None:
    left: list[tuple[int, str]] = []
    presence = SimpleNamespace(leave=lambda node, reason: left.append((node, reason)))
    guard, caller = gate(presence=presence), Caller(1, b"", "edge-0")
    with caplog.at_level("INFO", "fedcore.server"):
        for reason in ("TaskError", "\x1b[2J\u202e" * 5000, ""):
            headers = {"fedcore-reason": reason}
            asyncio.run(guard._prepare(network_gate.DEACTIVATE, caller, headers, b""))
    assert [node for node, _ in left] == [1, 1, 1]
    assert [reason.isprintable() and len(reason) < 250 for _, reason in left] == [True] * 3
    assert caplog.messages[0] == "device edge-0: left (TaskError)"
    assert all(len(line) < 300 and line.isprintable() for line in caplog.messages)
    assert caplog.messages[2] == "device edge-0: left"
