"""How many clients a run without a cohort gathers before it begins."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from flwr.app import Message

from fedcore.errors import RoundFailed
from fedcore.flower.grid import InProcessGrid
from server import app
from server.app import _gather


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


def test_all_are_waited_for() -> None:
    notes: list[str] = []
    assert _gather(Coming(3), lambda: 3, 30.0, notes.append) == 3
    (note,) = notes
    assert "waiting for all 3 devices" in note


def test_who_is_no_member_any_more_is_not_waited_for() -> None:
    left = [3, 3, 3, 3, 3]
    assert _gather(Coming(2), lambda: left.pop() if left else 2, 30.0, lambda note: None) == 2


def test_at_the_deadline_those_who_are_there_go_on() -> None:
    notes: list[str] = []
    assert _gather(Coming(2), lambda: 3, 0.2, notes.append) == 2
    assert notes[-1].startswith("2 of 3 devices came within federation.deadline_s = 0.2")


def test_without_anybody_nothing_begins() -> None:
    with pytest.raises(RoundFailed, match="no client connected within"):
        _gather(Coming(0), lambda: 0, 0.1, lambda note: None)
