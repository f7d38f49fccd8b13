"""A backup goes back to a run that goes on, whatever was committed while it was made."""

from __future__ import annotations

import os
import shutil
import signal
import tarfile
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest

import server.live.operators.backup as backup_module
from fedcore.errors import ConfigError, DataError, DiskFull, ResourceError
from server.live.journal.head import HEAD, JOURNAL, RECORDS, RESTORED
from server.live.journal.journal import VALUES, Journal, create, reopen
from server.live.operators.backup import back_up, check_place
from server.records import RoundRecord
from server.report.folder import JOURNAL_FOLDER
from server.rounds.checkpointing.progress import Progress
from server.rounds.strategies.state import StrategyState

NOW = datetime(2026, 5, 1, tzinfo=UTC)
SIZE = 20_000
"""Weights of 80 kB: too many for the database, so that they lie in files of their own."""


def progress(number: int) -> Progress:
    weights = np.full(SIZE, number, np.float32)
    return Progress(
        round=number,
        over=False,
        weights=weights,
        best=weights,
        best_round=number,
        most_failed=0,
        strategy=StrategyState(None, ()),
        preprocess=b"",
    )


def record(number: int) -> RoundRecord:
    return RoundRecord(
        round=number,
        rounds=100,
        seconds=1.0,
        cohort=1,
        updates=1,
        declined=0,
        failed=0,
        train_loss=None,
        metrics={},
        judged_on="nothing",
        epsilon_max=None,
        bytes_up=0,
        bytes_down=0,
    )


def commit(journal: Journal, number: int) -> None:
    journal.commit(progress(number), record(number) if number else None)
    journal.sweep()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "runs" / "orchard"


@contextmanager
def begun(run: Path, *, rounds: int = 3) -> Iterator[Journal]:
    with closing(create(run / JOURNAL_FOLDER, {"run": "orchard"})) as journal:
        for number in range(rounds + 1):
            commit(journal, number)
        yield journal


def restored(file: Path, into: Path) -> tuple[Path, Progress]:
    with tarfile.open(file) as tar:
        tar.extractall(into, filter="data")
    with closing(reopen(into / "orchard" / JOURNAL_FOLDER) or pytest.fail("no journal")) as journal:
        assert journal.repairs == ""
        assert journal.start is not None
        assert [one.round for one in journal.start.records] == list(range(1, journal.round + 1))
        return into / "orchard", journal.start.progress


def test_a_run_comes_back_with_what_its_journal_refers_to(run: Path, tmp_path: Path) -> None:
    with begun(run):
        (run / "incoming").mkdir()
        (run / "incoming" / "payload").write_bytes(b"x")
        (run / ".half").write_bytes(b"being written")
        (run / JOURNAL_FOLDER / VALUES / ("0" * 64)).write_bytes(b"nothing refers to it")
        (run / JOURNAL_FOLDER / VALUES / ("1" * 64 + ".new")).write_bytes(b"being written")
        (run / "metrics.jsonl").write_text("{}\n")
        done = back_up(run, tmp_path / "b.tar", now=NOW)
    assert done.bytes == (tmp_path / "b.tar").stat().st_size
    assert done.created == "2026-05-01T00:00:00Z"
    assert (tmp_path / "b.tar").stat().st_mode & 0o777 == 0o600
    again, there = restored(tmp_path / "b.tar", tmp_path / "again")
    assert (there.round, there.weights.tolist()) == (3, [3.0] * SIZE)
    found = {path.relative_to(again).as_posix() for path in again.rglob("*") if path.is_file()}
    values = {name for name in found if name.startswith(f"{JOURNAL_FOLDER}/{VALUES}/")}
    assert len(values) == 2, "of the last two rounds"
    journal = {f"{JOURNAL_FOLDER}/{name}" for name in (JOURNAL, HEAD, RECORDS)}
    assert found - values == {*journal, "metrics.jsonl"}
    assert done.files == len(found) + 1, "its mark, which is gone once it was gone on with"
    left = {path.name for path in run.iterdir()}
    assert left == {JOURNAL_FOLDER, "incoming", ".half", "metrics.jsonl"}


def test_what_a_killed_server_left_is_not_replayed_over_a_backup(run: Path, tmp_path: Path) -> None:
    with begun(run):
        back_up(run, tmp_path / "b.tar", now=NOW)
    child = os.fork()
    if not child:
        try:
            journal = reopen(run / JOURNAL_FOLDER)
            assert journal is not None
            for number in range(4, 8):
                commit(journal, number)
        finally:
            os.kill(os.getpid(), signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    with closing(reopen(copied(run, tmp_path / "later")) or pytest.fail("no journal")) as journal:
        assert journal.round == 7, "the killed process had gone on"
    assert (run / JOURNAL_FOLDER / f"{JOURNAL}-wal").stat().st_size > 0
    again, there = restored(tmp_path / "b.tar", run.parent)
    assert (there.round, there.weights.tolist()) == (3, [3.0] * SIZE)
    assert not (again / JOURNAL_FOLDER / RESTORED).exists(), "what follows is the run's own"
    with closing(reopen(again / JOURNAL_FOLDER) or pytest.fail("no journal")) as journal:
        commit(journal, 4)
    with closing(reopen(again / JOURNAL_FOLDER) or pytest.fail("no journal")) as journal:
        assert (journal.round, journal.repairs) == (4, "")


def copied(run: Path, to: Path) -> Path:
    """A journal as a killed process left it, to be looked at."""
    shutil.copytree(run / JOURNAL_FOLDER, to)
    return to


def test_a_backup_begins_with_its_mark(run: Path, tmp_path: Path) -> None:
    with begun(run):
        back_up(run, tmp_path / "b.tar", now=NOW)
    with tarfile.open(tmp_path / "b.tar") as tar:
        names = tar.getnames()
    assert names[0] == f"orchard/{JOURNAL_FOLDER}/{RESTORED}", "what is cut off has it, too"
    assert len(names) == len(set(names))


@pytest.mark.parametrize("place", ["orchard/b.tar", "orchard/deep/b.tar", "pear/b.tar", "link/b"])
def test_a_backup_goes_nowhere_that_a_run_would_empty(
    run: Path, tmp_path: Path, place: str
) -> None:
    for name in ("orchard", "pear"):
        (run.parent / name / "deep").mkdir(parents=True)
        (run.parent / name / "run.json").write_text("{}")
    (run.parent / "link").symlink_to(run)
    file = run.parent / place
    with pytest.raises(ConfigError, match=r"the next start of that run would remove the backup"):
        check_place(file)
    check_place(run.parent / "b.tar")


def test_a_backup_that_nobody_wants_any_more_leaves_nothing_behind(
    run: Path, tmp_path: Path
) -> None:
    calls = 0

    def wanted() -> None:
        nonlocal calls
        calls += 1
        if calls == 100:
            raise ResourceError("it ends")

    with begun(run):
        with (run / "large").open("wb") as stream:
            stream.truncate(1 << 40)
        with pytest.raises(ResourceError, match="it ends"):
            back_up(run, tmp_path / "b.tar", now=NOW, wanted=wanted)
    assert calls == 100, "not another piece was read"
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]
    assert {path.name for path in run.iterdir()} == {JOURNAL_FOLDER, "large"}


def test_backups_are_whole_while_rounds_are_committed(run: Path, tmp_path: Path) -> None:
    with begun(run) as journal:
        ending = threading.Event()

        def go_on() -> None:
            number = 4
            while not ending.is_set():
                commit(journal, number)
                number += 1

        thread = threading.Thread(target=go_on)
        thread.start()
        try:
            for number in range(25):
                back_up(run, tmp_path / f"{number}.tar", now=NOW)
        finally:
            ending.set()
            thread.join()
        last = journal.round
    seen = set()
    for number in range(25):
        _, there = restored(tmp_path / f"{number}.tar", tmp_path / str(number))
        assert set(there.weights.tolist()) == {float(there.round)}
        seen.add(there.round)
    assert len(seen) > 5, "commits went on meanwhile"
    assert max(seen) <= last


@pytest.mark.parametrize("moment", ["_link", "_copy"])
def test_a_commit_at_the_worst_moments_is_seen_and_made_good(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """Two commits sweep everything that was there before them."""
    with begun(run) as journal:
        real, calls = getattr(backup_module, moment), 0

        def disturbed(one: Path, other: Path) -> None:
            nonlocal calls
            calls += 1
            for _ in range(2 if calls <= 4 else 0):
                commit(journal, journal.round + 1)
            real(one, other)
            for _ in range(2 if calls <= 4 else 0):
                commit(journal, journal.round + 1)

        monkeypatch.setattr(backup_module, moment, disturbed)
        back_up(run, tmp_path / "b.tar", now=NOW)
    assert calls > 2, "once was not enough"
    _, there = restored(tmp_path / "b.tar", tmp_path / "again")
    assert set(there.weights.tolist()) == {float(there.round)}
    assert there.round > 3


def test_a_journal_that_never_rests_is_not_backed_up(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with begun(run) as journal:
        real = backup_module._copy

        def disturbed(one: Path, other: Path) -> None:
            for _ in range(3):
                commit(journal, journal.round + 1)
            real(one, other)
            for _ in range(3):
                commit(journal, journal.round + 1)

        monkeypatch.setattr(backup_module, "_copy", disturbed)
        with pytest.raises(ResourceError, match="pause the run"):
            back_up(run, tmp_path / "b.tar", now=NOW)
    assert not (tmp_path / "b.tar").exists()
    assert {path.name for path in run.iterdir()} == {JOURNAL_FOLDER}


def test_a_value_that_was_deleted_is_missed_at_once(run: Path, tmp_path: Path) -> None:
    with begun(run):
        pass
    values = sorted((run / JOURNAL_FOLDER / VALUES).iterdir())
    values[0].unlink()
    with pytest.raises(DataError, match=f"1 value missing, such as '{values[0].name}'"):
        back_up(run, tmp_path / "b.tar", now=NOW)
    assert not (tmp_path / "b.tar").exists()


def test_a_folder_may_have_any_name(tmp_path: Path) -> None:
    run = tmp_path / "50% off?mode=memory#1" / "orchard"
    with begun(run):
        pass
    back_up(run, tmp_path / "b.tar", now=NOW)
    assert restored(tmp_path / "b.tar", tmp_path / "again")[1].round == 3


def test_no_run_a_damaged_journal_and_a_full_disk_leave_nothing_behind(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DataError, match="there is no such run"):
        back_up(run, tmp_path / "b.tar", now=NOW)
    with begun(run):
        pass
    whole = (run / JOURNAL_FOLDER / JOURNAL).read_bytes()
    (run / JOURNAL_FOLDER / JOURNAL).write_bytes(b"SQLite format 3\x00" + b"\xff" * 5000)
    with pytest.raises(DataError, match=r"journal\.sqlite: cannot copy this database"):
        back_up(run, tmp_path / "b.tar", now=NOW)
    (run / JOURNAL_FOLDER / JOURNAL).write_bytes(whole)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("server.live.operators.backup.os.fsync", full)
    with pytest.raises(DiskFull):
        back_up(run, tmp_path / "b.tar", now=NOW)
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]
    assert {path.name for path in run.iterdir()} == {JOURNAL_FOLDER}
