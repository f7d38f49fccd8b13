"""What a journal keeps of a run."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedcore.errors import DiskFull
from fedcore.updates.messages import METRICS
from server.live.journal.entries import Entries, JournalEntry
from server.live.journal.head import JOURNAL
from server.live.journal.journal import (
    ACCEPTED,
    ACCEPTING,
    COMMITTED,
    COMMITTING,
    COPIED,
    POINTS,
    SELECTED,
    SELECTING,
    create,
    reopen,
)
from server.rounds.client_privacy.protection import ClientPlan, Protection, noise_of
from server.rounds.cohort import Cohort
from server.rounds.strategies.state import StrategyState
from tests.unit.server.live.journal.journals import (
    IDENTITY,
    LARGE,
    SMALL,
    answer,
    asked,
    filed,
    opened,
    progress,
    record,
    two_rounds,
    vector,
    weights_of,
)


@pytest.mark.parametrize("size", [SMALL, LARGE])
def test_a_run_goes_on_where_it_was(tmp_path: Path, size: int) -> None:
    two_rounds(tmp_path, size)
    with opened(tmp_path) as journal:
        assert journal.repairs == ""
        assert journal.identity == IDENTITY
        start = journal.start
        assert start is not None
        expected = progress(2, size)
        assert start.progress.weights.tobytes() == expected.weights.tobytes()
        assert start.progress.strategy.tree == expected.strategy.tree
        (kept,) = start.progress.strategy.arrays
        assert kept.dtype == np.float64
        assert kept.tobytes() == expected.strategy.arrays[0].tobytes()
        assert start.progress.preprocess == b"state"
        assert start.records == (record(1), record(2))
        assert start.cohort == 3
        assert journal.selected_cohort("train") == Cohort([4, 5, 6], dict.fromkeys([4, 5, 6], 1))
        assert journal.selected_cohort("evaluate") is None
        reply = journal.reply(asked(5))
        assert weights_of(reply) == [0.25]
        assert reply is not None
        assert dict(reply.content[METRICS]) == {"num-examples": 7, "train_loss": 0.35}
        assert reply.metadata.src_node_id == 5
        assert journal.reply(asked(4)) is None, "what it sent in the round before is no answer"
        assert journal.reply(asked(5, "evaluate")) is None
        once = np.shares_memory(start.progress.weights, start.progress.best)
        assert once == (size == LARGE), "weights that are the best ones too are held once"


@pytest.mark.parametrize("size", [SMALL, LARGE])
def test_what_models_have_cost_is_committed_with_them(tmp_path: Path, size: int) -> None:
    noise = tuple(np.arange(size) / 3 + number for number in range(2))
    protection = Protection(ClientPlan(9, 3, 1.1, 3), 0.25, ((4, 5), (6,)), noise)
    with closing(create(tmp_path, IDENTITY)) as journal:
        journal.commit(progress(0, size, protection=replace(protection, noise=())), None)
        journal.commit(
            progress(1, size, protection=protection), replace(record(1), client_epsilon=1.5)
        )
    with opened(tmp_path) as journal:
        assert journal.start is not None
        found = journal.start.progress
        assert found.protection == protection
        kept = noise_of(found.protection)
        assert [one.tobytes() for one in kept] == [one.tobytes() for one in noise]
        assert found.strategy.arrays[0].tolist() == progress(1, size).strategy.arrays[0].tolist()
        assert journal.start.records[0].client_epsilon == 1.5


def test_the_instance_outlives_a_restart_and_no_new_beginning(tmp_path: Path) -> None:
    with closing(create(tmp_path / "one", IDENTITY)) as journal:
        instance = journal.instance
    with opened(tmp_path / "one") as journal:
        assert journal.instance == instance
        assert journal.start is None
    with closing(create(tmp_path / "two", IDENTITY)) as journal:
        assert journal.instance != instance


def test_no_journal_is_none(tmp_path: Path) -> None:
    assert reopen(tmp_path) is None
    with closing(sqlite3.connect(tmp_path / JOURNAL)):
        pass
    assert reopen(tmp_path) is None, "it died before a run was noted"


def test_a_round_is_committed_once(tmp_path: Path) -> None:
    two_rounds(tmp_path)
    with opened(tmp_path) as journal:
        journal.commit(progress(2, weights=vector(9.0)), None)  # what a resumed run does first
    with opened(tmp_path) as journal:
        assert journal.start is not None
        assert journal.start.progress.weights[0] == 2.0
        journal.commit(progress(2, over=True), None)
    with opened(tmp_path) as journal:
        assert journal.start is not None
        assert journal.start.progress.over
        assert journal.start.records == (record(1), record(2))


def test_what_is_not_a_number_comes_back(tmp_path: Path) -> None:
    with closing(create(tmp_path, IDENTITY)) as journal:
        journal.commit(progress(0), None)
        journal.commit(progress(1), record(1, loss=float("nan")))
    with opened(tmp_path) as journal:
        assert journal.start is not None
        loss = journal.start.records[0].train_loss
        assert loss is not None
        assert np.isnan(loss)


def test_equal_values_share_a_file_and_old_ones_go(tmp_path: Path) -> None:
    with closing(create(tmp_path, IDENTITY)) as journal:
        journal.commit(progress(0, LARGE), None)
        for number in range(1, 6):
            journal.record_cohort("train", Cohort([4], dict.fromkeys([4], 1)))
            journal.accept(answer(asked(4), number, LARGE))  # the bytes of the round's weights
            journal.commit(progress(number, LARGE), record(number))
            journal.sweep()
    files = list((tmp_path / "values").iterdir())
    assert len(files) == 2 * 2, "weights and a strategy's moments, of the last two rounds"


def test_a_cohort_that_was_dropped_leaves_its_replies(tmp_path: Path) -> None:
    two_rounds(tmp_path)
    with opened(tmp_path) as journal:
        journal.drop_cohorts()
        assert journal.selected_cohort("train") is None
        journal.record_cohort("train", Cohort([5, 7], dict.fromkeys([5, 7], 1)))
        assert weights_of(journal.reply(asked(5))) == [0.25]


@pytest.mark.parametrize("late", [True, False])
def test_an_evaluation_of_a_model_that_changes_is_asked_for_again(
    tmp_path: Path, late: bool
) -> None:
    """After a restart, a device that the round went on without has answered, or one is refused."""
    two_rounds(tmp_path)
    with opened(tmp_path) as journal:
        journal.accept(answer(asked(4, "evaluate"), 0.5))
    with opened(tmp_path) as journal:
        journal.accept(answer(asked(6, "evaluate"), 0.5))
        assert journal.reply(asked(4, "evaluate")) is not None, "nothing has changed"
    with opened(tmp_path) as journal:
        assert journal.reply(asked(5)) is not None
        if late:
            journal.accept(answer(asked(6), 0.5))
        else:
            assert journal.discard("train", 5)
        assert journal.reply(asked(4, "evaluate")) is None
        journal.accept(answer(asked(4, "evaluate"), 0.75))
    with opened(tmp_path) as journal:
        assert weights_of(journal.reply(asked(4, "evaluate"))) == [0.75]
        assert journal.reply(asked(6, "evaluate")) is None


def test_what_those_asked_weigh_is_kept(tmp_path: Path) -> None:
    with closing(create(tmp_path, IDENTITY)) as journal:
        journal.record_cohort("train", Cohort([4, 6], {4: 1000, 6: 1}))
    with opened(tmp_path) as journal:
        assert journal.selected_cohort("train") == Cohort([4, 6], {4: 1000, 6: 1})
        journal.record_cohort("evaluate", Cohort([4]))
        assert journal.selected_cohort("evaluate") == Cohort([4])


def test_an_end_is_kept(tmp_path: Path) -> None:
    two_rounds(tmp_path)
    with opened(tmp_path) as journal:
        assert not journal.ended
        journal.end()
    with opened(tmp_path) as journal:
        assert journal.ended


class Died(Exception):
    pass


@pytest.mark.parametrize("point", POINTS)
def test_at_every_point_the_change_is_whole_or_not_there(tmp_path: Path, point: str) -> None:
    def die(reached: str) -> None:
        if reached == point:
            raise Died

    two_rounds(tmp_path)
    journal = reopen(tmp_path, on_point=die)
    assert journal is not None

    def go_on() -> None:
        journal.record_cohort("evaluate", Cohort([4], dict.fromkeys([4], 1)))
        journal.accept(answer(asked(6), 0.75))
        journal.commit(progress(3), record(3))

    with closing(journal), pytest.raises(Died):
        go_on()
    with opened(tmp_path) as journal:
        assert journal.repairs == ""
        assert journal.start is not None
        over = point in (COMMITTED, COPIED)
        assert journal.round == (3 if over else 2)
        assert len(journal.start.records) == journal.round
        evaluating = point in (SELECTED, ACCEPTING, ACCEPTED, COMMITTING)
        assert (journal.selected_cohort("evaluate") is not None) == evaluating
        assert (journal.reply(asked(6)) is not None) == (point in (ACCEPTED, COMMITTING))
    assert {SELECTING, *POINTS} == set(POINTS)


def test_replies_that_come_together_are_written_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writes: list[int] = []
    write = Entries.write

    def counted(self: Entries, new: Sequence[JournalEntry] = (), **more: Any) -> None:
        writes.append(len(new))
        if len(new) == 4:
            raise DiskFull("no room")
        write(self, new, **more)

    two_rounds(tmp_path)
    points: list[str] = []
    journal = reopen(tmp_path, on_point=points.append)
    assert journal is not None
    monkeypatch.setattr(Entries, "write", counted)
    with closing(journal):
        replies = [answer(asked(node), node / 4) for node in (4, 5, 6)]
        journal.accept(*replies)
        journal.accept(*replies)
        assert writes == [6], "each with its signature, once and not again"
        assert points == [ACCEPTING] * 3 + [ACCEPTED] * 3
        with pytest.raises(DiskFull):
            journal.accept(*(answer(asked(node), 0.5) for node in (7, 8)))
        assert not journal.holds("train", 7)
    with opened(tmp_path) as journal:
        found = [journal.reply(asked(node)) for node in (4, 5, 6, 7)]
        assert [one is not None for one in found] == [True, True, True, False]
        for one, reply in zip(found, replies, strict=False):
            assert one is not None
            assert one.content["arrays"] == reply.content["arrays"]


def test_a_row_is_written_once_the_files_that_it_names_are_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So a kill or a power cut at any moment leaves a reply whole, or to be asked for again."""
    done: list[str] = []
    write, fsync = Entries.write, os.fsync

    def written(self: Entries, new: Sequence[JournalEntry] = (), **more: Any) -> None:
        done.append(f"{len(new)} rows")
        write(self, new, **more)

    def synced(descriptor: int) -> None:
        fsync(descriptor)
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        done.append("folder" if path.is_dir() else "file")

    two_rounds(tmp_path, LARGE)
    journal = reopen(tmp_path, on_point=done.append)
    assert journal is not None
    replies = [filed(tmp_path, answer(asked(node), node / 4, LARGE)) for node in (4, 6)]
    monkeypatch.setattr(Entries, "write", written)
    monkeypatch.setattr(os, "fsync", synced)
    with closing(journal):
        journal.accept(*replies)
    assert sorted(done[:3]) == ["file", "file", "folder"]
    assert done[3:] == [ACCEPTING] * 2 + ["4 rows"] + [ACCEPTED] * 2
    del replies
    with opened(tmp_path) as journal:
        assert [weights_of(journal.reply(asked(node))) for node in (4, 6)] == [[1.0], [1.5]]


def test_a_file_that_the_disk_has_no_room_for_records_none_of_its_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync = os.fsync

    def full(descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}")
        if path.is_file() and os.pread(descriptor, 4, 128) == np.float32(1.5).tobytes():
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    two_rounds(tmp_path, LARGE)
    with opened(tmp_path) as journal:
        replies = [filed(tmp_path, answer(asked(node), node / 4, LARGE)) for node in (4, 6)]
        there = {*(tmp_path / "values").iterdir()}
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            with pytest.raises(DiskFull, match="free some space"):
                journal.accept(*replies)
        assert not any(journal.holds("train", node) for node in (4, 6))
        assert {*(tmp_path / "values").iterdir()} == there
        journal.accept(*replies)  # once there is room
        assert [weights_of(journal.reply(asked(node))) for node in (4, 6)] == [[1.0], [1.5]]


def test_a_full_disk_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    two_rounds(tmp_path, LARGE)
    with opened(tmp_path) as journal:

        def full(descriptor: int) -> None:
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr("os.fsync", full)
            with pytest.raises(DiskFull):
                journal.accept(answer(asked(6), 0.125, LARGE))
            with pytest.raises(DiskFull):
                journal.commit(progress(3, LARGE), record(3))
        assert journal.reply(asked(6)) is None
        assert not list((tmp_path / "values").glob("*.new"))
    with opened(tmp_path) as journal:
        assert journal.round == 2
        assert weights_of(journal.reply(asked(5))) == [0.25]


def test_a_full_database_leaves_what_was_there(tmp_path: Path) -> None:
    two_rounds(tmp_path)
    with opened(tmp_path) as journal:
        connection = journal._entries._connection
        (pages,) = connection.execute("pragma page_count").fetchone()
        connection.execute(f"pragma max_page_count = {pages}")

        def fill() -> None:
            for node in range(10, 200):
                journal.accept(answer(asked(node), 1.0, 4000))

        with pytest.raises(DiskFull, match="continue with --resume"):
            fill()
    with opened(tmp_path) as journal:
        assert journal.repairs == ""
        assert weights_of(journal.reply(asked(5))) == [0.25]


STATES = {
    "float16": np.arange(3, dtype=np.float16),
    "float64": np.array([[0.1, np.nan], [np.inf, -0.0]]),
    "bool": np.array([True, False]),
    "uint8": np.array(7, np.uint8),
    "int64": np.array([-(2**62)]),
    "empty": np.zeros((0, 3), np.float32),
}


@pytest.mark.parametrize("name", STATES)
def test_a_strategys_arrays_come_back_as_they_were(tmp_path: Path, name: str) -> None:
    kept = StrategyState({"strategy": "AlgorithmStrategy", "holds": []}, (STATES[name],))
    with closing(create(tmp_path, IDENTITY)) as journal:
        journal.commit(progress(0, strategy=kept), None)
        journal.record_cohort("train", Cohort([4], dict.fromkeys([4], 1)))
        journal.commit(progress(1, strategy=kept), record(1))
    with opened(tmp_path) as journal:
        assert journal.start is not None
        (found,) = journal.start.progress.strategy.arrays
    assert (found.dtype, found.shape) == (STATES[name].dtype, STATES[name].shape)
    assert found.tobytes() == STATES[name].tobytes()
