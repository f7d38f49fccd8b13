"""The client of a running server: typed answers, and answers that are none."""

from __future__ import annotations

from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

import fedcore
from fedcore.errors import DataError, ResourceError
from tests.unit.server.live.journal.journals import record

STATUS = {
    "run": "trial",
    "state": "running",
    "stage": None,
    "waits": "devices",
    "round": 3,
    "rounds": 9,
    "last": {"event": "round_finished", **asdict(record(3)), "clients_per_s": 4.0},
    "notes": ["a note"],
    "devices": {"members": 2, "there": 1, "drained": 0},
    "project": "orchard",
    "listens": "0.0.0.0:9092",
    "wakes": 9093,
    "certificate_not_after": "2027-01-01T00:00:00Z",
    "roster": {"version": 4, "damage": None},
    "up_s": 12.5,
    "version": "0.1.0",
    "of a later version": True,
}
DEVICE = {
    "name": "edge-1",
    "node_id": 7,
    "there": True,
    "awake": True,
    "owes": False,
    "drained": False,
    "num_examples": None,
    "certificate_not_after": "2027-01-01T00:00:00Z",
}


def answering(monkeypatch: pytest.MonkeyPatch, answer: dict[str, Any]) -> list[dict[str, Any]]:
    asked: list[dict[str, Any]] = []

    def ask(folder: Path, request: dict[str, Any]) -> dict[str, Any]:
        asked.append({"folder": folder, **request})
        return answer

    monkeypatch.setattr("server.live.operators.server_client.ask_local", ask)
    return asked


def test_answers_are_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    client = fedcore.ServerClient("server")
    asked = answering(monkeypatch, STATUS)
    status = client.status()
    assert asked == [{"folder": Path("server"), "verb": "status"}]
    assert (status.round, status.devices.there, status.roster.version) == (3, 1, 4)
    assert status.certificate_not_after == datetime(2027, 1, 1, tzinfo=UTC)
    assert status.last == record(3)
    answering(monkeypatch, {"devices": [DEVICE]})
    assert [(one.name, one.awake) for one in client.devices()] == [("edge-1", True)]
    assert (status.left, client.devices()[0].reason) == ({}, None), "of an earlier version"
    answering(monkeypatch, {"devices": [DEVICE | {"reason": "TaskError"}]})
    assert client.devices()[0].reason == "TaskError"
    answering(monkeypatch, {"run": "trial", "rounds": [asdict(record(1)), asdict(record(2))]})
    assert client.rounds() == (record(1), record(2))


def test_requests_say_what_is_to_be_done(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    client = fedcore.ServerClient("server")
    asked = answering(monkeypatch, {"run": "trial", "state": "paused"})
    assert [client.pause().state, client.resume().run, client.stop().state] == [
        *("paused", "trial", "paused")
    ]
    assert [one["verb"] for one in asked] == ["pause", "resume", "stop"]
    asked = answering(monkeypatch, {"device": "edge-1", "drained": False})
    assert client.drain("edge-1", undo=True) is False
    assert (asked[0]["device"], asked[0]["undo"]) == ("edge-1", True)
    monkeypatch.chdir(tmp_path)
    done = {"file": "/b.tar", "files": 3, "bytes": 9, "created": "2026-01-01T00:00:00Z"}
    asked = answering(monkeypatch, done)
    assert client.backup("b.tar").files == 3
    assert asked[0]["file"] == str(tmp_path / "b.tar"), "the server has another current folder"


@pytest.mark.parametrize(
    "answer",
    [
        {},
        {**STATUS, "devices": {"members": "many"}},
        {**STATUS, "notes": 5},
        {**STATUS, "certificate_not_after": "\x1b[31mnever"},
        {**STATUS, "last": {"round": 1}},
    ],
)
def test_an_answer_of_another_form_is_an_error(
    monkeypatch: pytest.MonkeyPatch, answer: dict[str, Any]
) -> None:
    answering(monkeypatch, answer)
    with pytest.raises(DataError, match="not of a known form") as caught:
        fedcore.ServerClient("server").status()
    assert "\x1b" not in str(caught.value)


@pytest.mark.parametrize(("call", "words"), [("rounds", ()), ("devices", ()), ("drain", ("a",))])
def test_an_answer_without_what_was_asked_for_is_an_error(
    monkeypatch: pytest.MonkeyPatch, call: str, words: tuple[str, ...]
) -> None:
    answering(monkeypatch, {"run": "trial"})
    with pytest.raises(DataError, match="not of a known form"):
        getattr(fedcore.ServerClient("server"), call)(*words)


def test_nobody_answers(tmp_path: Path) -> None:
    authority = fedcore.create_authority(tmp_path / "authority", "orchard")
    authority.add_server(["localhost"])
    with pytest.raises(ResourceError, match="no server with this identity responds"):
        fedcore.ServerClient(tmp_path / "authority" / "server").status()
