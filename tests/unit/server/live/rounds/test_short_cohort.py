"""Rounds that begin with fewer devices than their cohort, where the others stay away."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from fedcore.errors import RoundFailed
from fedcore.flower.identity import assume_identity
from fedcore.observability import patience
from server.live.journal.journal import Journal, create
from server.live.rounds import journaled as journal_keeper
from server.live.rounds.journaled import JournalCheckpointer
from server.rounds.cohort import Cohort
from tests.unit.server.live.rounds.test_journaled import Devices, Rounds, answered, messages

NODES = (4, 5, 6)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    assume_identity(1)
    monkeypatch.setattr(journal_keeper, "_POLL_S", 0.01)


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    with closing(create(tmp_path, {})) as made:
        yield made


def keeper_of(journal: Journal, deadline_s: float = 30.0, **more: Any) -> JournalCheckpointer:
    return JournalCheckpointer(journal, report=lambda record: None, deadline_s=deadline_s, **more)


class Gone:
    """Draws for a cohort of three, of whom some are away for good."""

    def __init__(self, here: list[int], *, quorum: int = 2) -> None:
        self.here, self.quorum, self.draws = here, quorum, 0

    def __call__(self, *, short: bool = False) -> Cohort:
        self.draws += 1
        if len(self.here) < (self.quorum if short else 3):
            raise RoundFailed(f"round 2: {len(self.here)} are connected, but 3 are needed. Wait.")
        return Cohort(self.here)

    def missing(self, kind: str) -> list[str]:
        return [f"edge-{node}" for node in NODES if node not in self.here]


def test_a_round_begins_without_a_device_that_stays_away(journal: Journal) -> None:
    gone, notes = Gone([4, 6]), list[str]()
    keeper = keeper_of(journal, grace_s=0.05, missing=gone.missing, on_note=notes.append)
    began = time.monotonic()
    assert keeper.cohort("train", gone).nodes == [4, 6]
    assert time.monotonic() - began >= 0.05
    assert notes == [
        "round 2: 2 are connected, but 3 are needed. It begins with 2, enough for the quorum, and "
        "so do the rounds that follow until more connect. Missing: edge-5."
    ]


def test_who_was_missing_in_the_round_before_is_not_waited_for_again(journal: Journal) -> None:
    gone, notes = Gone([4, 6]), list[str]()
    keeper = keeper_of(journal, grace_s=0.05, missing=gone.missing, on_note=notes.append)
    keeper.cohort("train", gone)
    journal.drop_cohorts()
    keeper._grace_s, gone.draws = 3600.0, 0
    assert keeper.cohort("train", gone).nodes == [4, 6]
    assert gone.draws == 2  # in full, and short at once
    assert len(notes) == 1  # said once
    journal.drop_cohorts()
    gone.here = [4, 5, 6]
    assert keeper.cohort("train", gone).nodes == [4, 5, 6]


def test_a_full_evaluation_does_not_make_the_next_training_wait_again(journal: Journal) -> None:
    gone = Gone([4, 6])
    keeper = keeper_of(journal, evaluated=2, grace_s=0.05, missing=gone.missing)
    keeper.cohort("train", gone)
    assert keeper.cohort("evaluate", lambda *, short=False: Cohort([4, 6])).nodes == [4, 6]
    journal.drop_cohorts()
    keeper._grace_s, gone.draws = 3600.0, 0
    assert keeper.cohort("train", gone).nodes == [4, 6]
    assert gone.draws == 2  # in full, and short at once


@pytest.mark.parametrize("rejoin_s", [0.0, 3600.0], ids=["fresh", "resumed"])
def test_a_quorum_begins_at_a_deadline_that_comes_before_all_have_had_time_to_connect(
    journal: Journal, rejoin_s: float
) -> None:
    """Or one device that stays away ends the server, and each resume."""
    gone = Gone([4, 6])
    keeper = keeper_of(
        journal, deadline_s=0.1, grace_s=3600.0, rejoin_s=rejoin_s, missing=gone.missing
    )
    assert keeper.cohort("train", gone).nodes == [4, 6]


def test_where_all_that_could_come_are_there_nobody_is_waited_for(journal: Journal) -> None:
    keeper = keeper_of(journal, grace_s=3600.0, missing=lambda kind: [])  # the lost one is drained
    assert keeper.cohort("train", Gone([4, 6])).nodes == [4, 6]


def test_fewer_than_the_quorum_are_waited_for_by_name_until_the_deadline(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patience, "SILENT_S", 0.0)
    gone, waits = Gone([4], quorum=2), list[str]()
    keeper = keeper_of(
        journal, deadline_s=0.1, grace_s=0.0, missing=gone.missing, on_wait=waits.append
    )
    with pytest.raises(RoundFailed, match="1 are connected"):
        keeper.cohort("train", gone)
    assert waits[0].endswith(" left. Missing: edge-5, edge-6.")


@pytest.mark.parametrize(
    ("quorum", "timeout", "why"),
    [
        (0.5, 5.0, "the connection ended before a reply came."),
        (1.0, 0.1, "no reply came by federation.deadline_s."),
    ],
)
def test_who_is_lost_during_a_round_is_named(
    journal: Journal, quorum: float, timeout: float, why: str
) -> None:
    notes: list[str] = []
    grid = Rounds(
        Devices(gone={6: 10**6}),
        journal,
        admit=set,
        quorum=quorum,
        on_note=notes.append,
        name="edge-{}".format,
    )
    assert answered(grid.send_and_receive(messages(), timeout=timeout)) == [4, 5]
    assert len(notes) == 1
    assert notes[0].startswith(f"round 1 (train) goes on without edge-6: {why}")


def test_judges_that_the_project_has_are_waited_for_however_few_train(journal: Journal) -> None:
    """And no more than it has: two of five wanted, where a round trains one."""
    draws: list[int] = []

    def draw(*, short: bool = False) -> Cohort:
        draws.append(1)
        return Cohort([4, 6][: len(draws)])

    keeper = keeper_of(journal, evaluated=5, judges=lambda: 2)
    journal.record_cohort("train", Cohort([5]))
    assert keeper.cohort("evaluate", draw).nodes == [4, 6]
    assert len(draws) == 2


def test_only_devices_that_messages_of_the_kind_are_for_are_missing(journal: Journal) -> None:
    """A judge that is away does not keep a round from beginning without one that trains."""
    gone, asked = Gone([4, 6]), list[str]()

    def missing(kind: str) -> list[str]:
        asked.append(kind)
        return ["edge-5"] if kind == "evaluate" else []

    keeper = keeper_of(journal, grace_s=3600.0, missing=missing)
    assert keeper.cohort("train", gone).nodes == [4, 6]
    assert set(asked) == {"train"}


def test_a_judge_that_stays_away_is_waited_for_once(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal_keeper, "GRACE_S", 0.05)
    here, draws = [4], list[int]()

    def draw(*, short: bool = False) -> Cohort:
        draws.append(len(here))
        return Cohort(list(here))

    keeper = keeper_of(journal, evaluated=5, judges=lambda: 2)
    assert keeper.cohort("evaluate", draw).nodes == [4]
    journal.drop_cohorts()
    monkeypatch.setattr(journal_keeper, "GRACE_S", 3600.0)
    draws.clear()
    assert keeper.cohort("evaluate", draw).nodes == [4]
    assert draws == [1]
    journal.drop_cohorts()
    here.append(6)  # it is back
    assert keeper.cohort("evaluate", draw).nodes == [4, 6]
