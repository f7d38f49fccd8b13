"""How many clients a run without a cohort gathers before it begins."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

import pytest
from flwr.app import Message

from fedcore.errors import RoundFailed
from fedcore.flower.grid import InProcessGrid
from fedcore.observability import patience
from server.rounds import app
from server.rounds.app import Listener, _gather, _wait_for_nodes


class Coming(InProcessGrid):
    """One more node is there each time that somebody looks, up to ``most``."""

    def __init__(self, most: int) -> None:
        super().__init__(1, (), lambda message: message)
        self.most, self.there = most, 0

    def get_node_ids(self) -> Iterable[int]:
        found = range(self.there)
        self.there = min(self.there + 1, self.most)
        return found

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        raise AssertionError("nobody is asked anything")


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "_POLL_S", 0.01)


def told_to(on_note: Callable[[str], None], **more: Any) -> Listener:
    return Listener(on_note, lambda record: None, lambda outcome: None, **more)


def test_all_are_waited_for() -> None:
    notes: list[str] = []
    assert _gather(Coming(3), lambda: 3, 30.0, told_to(notes.append)) == 3
    (note,) = notes
    assert "waiting for all 3 devices" in note


def test_who_is_no_member_any_more_is_not_waited_for() -> None:
    left = [3, 3, 3, 3, 3]
    assert _gather(Coming(2), lambda: left.pop() if left else 2, 30.0, told_to(print)) == 2


def test_at_the_deadline_those_who_are_there_go_on() -> None:
    notes: list[str] = []
    assert _gather(Coming(2), lambda: 3, 0.2, told_to(notes.append)) == 2
    assert notes[-1].startswith("2 of 3 devices connected within federation.deadline_s = 0.2")


def test_without_anybody_nothing_begins() -> None:
    with pytest.raises(RoundFailed, match="no client connected within"):
        _gather(Coming(0), lambda: 0, 0.1, told_to(print))


def test_whoever_waits_for_devices_hears_how_many_there_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(patience, "SILENT_S", 0.05)
    waits: list[str] = []
    with pytest.raises(RoundFailed, match="1 client connected"):
        _wait_for_nodes(Coming(1), 3, 0.5, told_to(print, on_wait=waits.append))
    assert re.fullmatch(
        r"waiting for devices, 1 of 3 connected: 0\.\d+ s so far, 0\.\d+ s left "
        r"\(federation\.deadline_s\)",
        waits[0],
    )
    assert 2 <= len(waits) <= 5, "each time that it has lasted twice as long"
