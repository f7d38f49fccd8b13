from __future__ import annotations

import sqlite3
import tarfile
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path

import pytest

from fedcore.errors import DataError
from server.live.backup import back_up

NOW = datetime(2026, 5, 1, tzinfo=UTC)


def test_a_database_in_use_and_plain_files_come_back(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "orchard"
    (run / "incoming").mkdir(parents=True)
    (run / "incoming" / "payload").write_bytes(b"x")
    (run / "values").mkdir()
    (run / "values" / "w.safetensors").write_bytes(b"weights")
    (run / ".half").write_bytes(b"being written")
    with closing(sqlite3.connect(run / "journal.sqlite")) as journal:
        journal.execute("PRAGMA journal_mode=WAL")
        journal.execute("CREATE TABLE rounds (number INTEGER)")
        journal.executemany("INSERT INTO rounds VALUES (?)", [(n,) for n in range(100)])
        journal.commit()
        done = back_up(run, tmp_path / "b.tar", now=NOW)
    assert (done.files, done.created) == (2, "2026-05-01T00:00:00Z")
    assert done.bytes == (tmp_path / "b.tar").stat().st_size
    assert (tmp_path / "b.tar").stat().st_mode & 0o777 == 0o600
    with tarfile.open(tmp_path / "b.tar") as tar:
        tar.extractall(tmp_path / "again", filter="data")
    again = tmp_path / "again" / "orchard"
    found = sorted(str(path.relative_to(again)) for path in again.rglob("*") if path.is_file())
    assert found == ["journal.sqlite", "values/w.safetensors"]
    assert (again / "values" / "w.safetensors").read_bytes() == b"weights"
    with closing(sqlite3.connect(again / "journal.sqlite")) as journal:
        assert journal.execute("SELECT count(*) FROM rounds").fetchone() == (100,)


def test_no_run_and_a_damaged_database_leave_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no such run"):
        back_up(tmp_path / "none", tmp_path / "b.tar", now=NOW)
    run = tmp_path / "run"
    run.mkdir()
    (run / "journal.sqlite").write_bytes(b"SQLite format 3\x00" + b"\xff" * 5000)
    with pytest.raises(DataError, match=r"journal\.sqlite: this database cannot be copied"):
        back_up(run, tmp_path / "b.tar", now=NOW)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
