"""What a journal keeps of a run, and what is left of it after damage."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Message, MetricRecord, RecordDict

from fedcore.errors import DataError, DiskFull
from fedcore.flower.identity import assume_identity
from fedcore.updates.messages import ARRAYS, METRICS, weights_record
from fedcore.updates.pack import Vector
from server.journal import (
    ACCEPTED,
    ACCEPTING,
    COMMITTED,
    COMMITTING,
    COPIED,
    POINTS,
    SELECTED,
    SELECTING,
    Journal,
    create,
    reopen,
)
from server.journal_head import HEAD, JOURNAL
from server.progress import Progress
from server.records import RoundRecord
from server.strategy_state import Remembered

IDENTITY = {"run": {"name": "trial"}}
SMALL, LARGE = 10, 50_000  # elements: beside an entry, and in a file of its own


@pytest.fixture(autouse=True)
def _flowers_identity() -> None:
    assume_identity(1)


def vector(number: float, size: int = SMALL) -> Vector:
    return np.full(size, number, np.float32)


def progress(number: int, size: int = SMALL, **changes: object) -> Progress:
    made = Progress(
        round=number,
        over=False,
        weights=vector(number, size),
        best=vector(number, size),
        best_round=number,
        most_failed=1,
        strategy=Remembered(
            {"strategy": "FedAvgM", "holds": [["m", {"array": 0}]]},
            (np.arange(size, dtype=np.float64) + number,),
        ),
        preprocess=b"state",
    )
    return replace(made, **changes)  # type: ignore[arg-type]


def record(number: int, loss: float | None = 0.1) -> RoundRecord:
    return RoundRecord(
        round=number,
        rounds=9,
        seconds=1.5,
        cohort=3,
        updates=3,
        declined=0,
        failed=0,
        train_loss=loss,
        metrics={"accuracy": 1 / 3},
        judged_on="cloud",
        epsilon_max=None,
        bytes_up=1,
        bytes_down=2,
    )


def asked(node: int, kind: str = "train") -> Message:
    return Message(RecordDict(), node, kind)


def answer(message: Message, value: float, size: int = SMALL) -> Message:
    content = RecordDict(
        {
            ARRAYS: weights_record(vector(value, size)),
            METRICS: MetricRecord({"num-examples": 7, "train_loss": 0.1 + value}),
        }
    )
    return Message(content, reply_to=message)


@contextmanager
def opened(folder: Path) -> Iterator[Journal]:
    journal = reopen(folder)
    assert journal is not None
    with closing(journal):
        yield journal


def two_rounds(folder: Path, size: int = SMALL) -> None:
    """Two rounds that are over, and one in which a node has answered."""
    with closing(create(folder, IDENTITY)) as journal:
        journal.commit(progress(0, size), None)
        for number in (1, 2):
            journal.ask("train", [4, 5, 6])
            journal.accept(answer(asked(4), 0.5, size))
            journal.commit(progress(number, size), record(number))
        journal.ask("train", [4, 5, 6])
        journal.accept(answer(asked(5), 0.25, size))


def weights_of(reply: Message | None) -> list[float]:
    assert reply is not None
    return np.unique(reply.content[ARRAYS]["model"].numpy()).tolist()  # type: ignore[index]


@pytest.mark.parametrize("size", [SMALL, LARGE])
def test_a_run_goes_on_where_it_was(tmp_path: Path, size: int) -> None:
    two_rounds(tmp_path, size)
    with opened(tmp_path) as journal:
        assert journal.mended == ""
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
        assert journal.asked("train") == [4, 5, 6]
        assert journal.asked("evaluate") is None
        reply = journal.reply(asked(5))
        assert weights_of(reply) == [0.25]
        assert reply is not None
        assert dict(reply.content[METRICS]) == {"num-examples": 7, "train_loss": 0.35}
        assert reply.metadata.src_node_id == 5
        assert journal.reply(asked(4)) is None, "what it sent in the round before is no answer"
        assert journal.reply(asked(5, "evaluate")) is None
        once = np.shares_memory(start.progress.weights, start.progress.best)
        assert once == (size == LARGE), "weights that are the best ones too are held once"


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
            journal.ask("train", [4])
            journal.accept(answer(asked(4), number, LARGE))  # the bytes of the round's weights
            journal.commit(progress(number, LARGE), record(number))
    files = list((tmp_path / "values").iterdir())
    assert len(files) == 2 * 2, "weights and a strategy's moments, of the last two rounds"


def test_a_cohort_that_was_dropped_leaves_its_replies(tmp_path: Path) -> None:
    two_rounds(tmp_path)
    with opened(tmp_path) as journal:
        journal.drop()
        assert journal.asked("train") is None
        journal.ask("train", [5, 7])
        assert weights_of(journal.reply(asked(5))) == [0.25]


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
    journal = reopen(tmp_path, reached=die)
    assert journal is not None

    def go_on() -> None:
        journal.ask("evaluate", [4])
        journal.accept(answer(asked(6), 0.75))
        journal.commit(progress(3), record(3))

    with closing(journal), pytest.raises(Died):
        go_on()
    with opened(tmp_path) as journal:
        assert journal.mended == ""
        assert journal.start is not None
        over = point in (COMMITTED, COPIED)
        assert journal.round == (3 if over else 2)
        assert len(journal.start.records) == journal.round
        evaluating = point in (SELECTED, ACCEPTING, ACCEPTED, COMMITTING)
        assert (journal.asked("evaluate") is not None) == evaluating
        assert (journal.reply(asked(6)) is not None) == (point in (ACCEPTED, COMMITTING))
    assert {SELECTING, *POINTS} == set(POINTS)


def flip(path: Path, place: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[place] ^= 0x40
    path.write_bytes(raw)


def damage_every_page(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    for start in range(4096, len(raw), 4096):
        raw[start : start + 64] = bytes(64)
    path.write_bytes(raw)


DAMAGES: list[Callable[[Path], object]] = [
    lambda path: path.write_bytes(path.read_bytes()[:5000]),
    lambda path: path.write_bytes(b""),
    lambda path: path.write_bytes(b"nothing like it"),
    damage_every_page,
]


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("size", [SMALL, LARGE])
def test_commits_outlive_the_journals_file(
    tmp_path: Path, damage: Callable[[Path], object], size: int
) -> None:
    two_rounds(tmp_path, size)
    damage(tmp_path / JOURNAL)
    with opened(tmp_path) as journal:
        assert "taken from its copy" in journal.mended
        assert journal.start is not None
        assert journal.start.progress.weights.tobytes() == vector(2, size).tobytes()
        assert journal.start.records == (record(1), record(2))
        assert journal.reply(asked(5)) is None
    with opened(tmp_path) as journal:
        assert journal.mended == "", "it is mended for good"


def test_without_its_copy_a_damaged_journal_is_refused(tmp_path: Path) -> None:
    two_rounds(tmp_path)
    (tmp_path / JOURNAL).write_bytes(b"nothing like it")
    flip(tmp_path / HEAD, 400)
    with pytest.raises(DataError, match=r"restore the folder .* --fresh"):
        reopen(tmp_path)


def test_a_damaged_copy_is_made_anew(tmp_path: Path) -> None:
    two_rounds(tmp_path)
    before = (tmp_path / HEAD).read_bytes()
    (tmp_path / HEAD).write_bytes(before[: len(before) // 2])
    with opened(tmp_path) as journal:
        assert journal.mended == ""
    assert (tmp_path / HEAD).read_bytes() == before


def test_damaged_weights_are_found_and_the_round_before_stands(tmp_path: Path) -> None:
    two_rounds(tmp_path, LARGE)
    for path in (tmp_path / "values").iterdir():
        if path.read_bytes()[: 4 * LARGE] == vector(2, LARGE).tobytes():
            flip(path, 1000)
    with opened(tmp_path) as journal:
        assert "goes on after round 1" in journal.mended
        assert journal.start is not None
        assert journal.start.progress.weights.tobytes() == vector(1, LARGE).tobytes()
        assert journal.start.records == (record(1),)
        assert journal.asked("train") is None


def test_where_no_weights_are_whole_it_is_refused(tmp_path: Path) -> None:
    two_rounds(tmp_path, LARGE)
    for path in (tmp_path / "values").iterdir():
        path.write_bytes(b"")
    with pytest.raises(DataError, match="No round's weights are whole"):
        reopen(tmp_path)


def test_a_damaged_reply_is_asked_for_again(tmp_path: Path) -> None:
    two_rounds(tmp_path, LARGE)
    for path in (tmp_path / "values").iterdir():
        if path.read_bytes()[-4 * LARGE :] == vector(0.25, LARGE).tobytes():
            flip(path, 1000)
    with opened(tmp_path) as journal:
        assert journal.round == 2
        assert journal.reply(asked(5)) is None
        journal.accept(answer(asked(5), 0.25, LARGE))
        assert weights_of(journal.reply(asked(5))) == [0.25]


@pytest.mark.parametrize("seed", range(60))
def test_no_flipped_byte_changes_what_is_read(tmp_path: Path, seed: int) -> None:
    two_rounds(tmp_path)
    path = tmp_path / JOURNAL
    rng = np.random.default_rng(seed)
    flip(path, int(rng.integers(path.stat().st_size)))
    try:
        journal = reopen(tmp_path)
    except DataError:
        return  # found, and nothing was used
    assert journal is not None
    with closing(journal):
        assert journal.start is not None
        assert journal.start.progress.weights.tobytes() == vector(2).tobytes()
        assert journal.start.records == (record(1), record(2))
        reply = journal.reply(asked(5))
        assert reply is None or weights_of(reply) == [0.25]


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

        with pytest.raises(DiskFull, match="go on with --resume"):
            fill()
    with opened(tmp_path) as journal:
        assert journal.mended == ""
        assert weights_of(journal.reply(asked(5))) == [0.25]
