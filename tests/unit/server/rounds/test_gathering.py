"""How many clients a run without a cohort gathers before it begins."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

import pytest
from flwr.app import Message

from fedcore.config.run import FederationConfig
from fedcore.errors import RoundFailed
from fedcore.flower.grid import InProcessGrid
from fedcore.observability import patience
from server.rounds import gathering
from server.rounds.app import Listener
from server.rounds.gathering import Waiting
from server.rounds.roles import Roles


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
    monkeypatch.setattr(gathering, "_POLL_S", 0.01)


def told_to(on_note: Callable[[str], None], **more: Any) -> Listener:
    return Listener(on_note, lambda record: None, lambda outcome: None, **more)


def waiting(
    grid: Coming, deadline_s: float, listener: Listener | None = None, **federation: Any
) -> Waiting:
    """Waits for clients that are named by their nodes."""
    roles = Roles(FederationConfig(**federation), lambda node: f"client-{node}")
    return Waiting(grid, roles, deadline_s, listener or told_to(print))


def test_all_are_waited_for() -> None:
    notes: list[str] = []
    assert waiting(Coming(3), 30.0, told_to(notes.append)).for_all(lambda: 3) == 3
    (note,) = notes
    assert "waiting for all 3 devices" in note


def test_who_is_no_member_any_more_is_not_waited_for() -> None:
    left = [3, 3, 3, 3, 3]
    assert waiting(Coming(2), 30.0).for_all(lambda: left.pop() if left else 2) == 2


def test_at_the_deadline_those_who_are_there_go_on() -> None:
    notes: list[str] = []
    assert waiting(Coming(2), 0.2, told_to(notes.append)).for_all(lambda: 3) == 2
    assert notes[-1].startswith("2 of 3 devices connected within federation.deadline_s = 0.2")


def test_without_anybody_nothing_begins() -> None:
    with pytest.raises(RoundFailed, match="no client connected within"):
        waiting(Coming(0), 0.1).for_all(lambda: 0)


def test_whoever_waits_for_devices_hears_how_many_there_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(patience, "SILENT_S", 0.05)
    waits: list[str] = []
    with pytest.raises(RoundFailed, match="1 client connected"):
        waiting(Coming(1), 0.5, told_to(print, on_wait=waits.append)).for_cohort(3)
    assert re.fullmatch(
        r"waiting for devices, 1 of 3 connected: 0\.\d+ s so far, 0\.\d+ s left "
        r"\(federation\.deadline_s\)",
        waits[0],
    )
    assert 2 <= len(waits) <= 5, "each time that it has lasted twice as long"


APART = {"holdout": 0.6, "holdout_by": "clients", "evaluate_cohort": 2}
"""Of client-0 to client-9 number 2, 3, 6, 7 and no others are judges; they come one by one."""


def test_a_cohort_is_of_those_who_train() -> None:
    grid = Coming(9)
    waiting(grid, 30.0, **APART).for_cohort(3)
    assert grid.there >= 5  # clients 0, 1 and 4 train


def test_judges_are_waited_for_too() -> None:
    grid = Coming(9)
    waiting(grid, 30.0, **APART).for_cohort(1)
    assert grid.there >= 4  # clients 2 and 3 judge
    with pytest.raises(RoundFailed, match=r"1 client that judge connected .*needs 2"):
        waiting(Coming(3), 0.1, **APART).for_cohort(2)


def test_too_few_who_train_are_told_apart_from_judges() -> None:
    with pytest.raises(RoundFailed, match=r"3 clients that train connected .*cohort needs 4"):
        waiting(Coming(5), 0.1, **APART).for_cohort(4)


def test_of_all_that_are_there_those_who_train_are_the_cohort() -> None:
    assert waiting(Coming(5), 30.0, **APART).for_all(lambda: 5) == 3
    with pytest.raises(RoundFailed, match="1 client that judge connected"):
        waiting(Coming(3), 0.1, **APART).for_all(lambda: 3)
    with pytest.raises(RoundFailed, match=r"no client connected within .* = 0\.1 that trains"):
        waiting(Coming(1), 0.1, **APART | {"holdout": 0.99}).for_all(lambda: 1)


def test_whoever_waits_for_judges_hears_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "SILENT_S", 0.02)
    waits: list[str] = []
    with pytest.raises(RoundFailed):
        waiting(Coming(2), 0.2, told_to(print, on_wait=waits.append), **APART).for_cohort(2)
    assert waits[0].startswith("waiting for devices that judge, 0 of 2 connected: ")
