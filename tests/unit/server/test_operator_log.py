from __future__ import annotations

import errno
import json
import os
import threading
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path

import pytest

from fedcore.errors import DataError, DiskFull
from server.operator_log import AUDIT, MARK, Audit, verify_audit


def log(path: Path) -> Audit:
    return Audit(path, clock=lambda: datetime(2026, 5, 1, 12, 30, tzinfo=UTC))


def write(path: Path, count: int) -> None:
    audit = log(path)
    for number in range(count):
        audit.record(by="anna", action="pause", outcome="accepted", number=number)
    audit.close()


def test_a_line_says_who_did_what_when_and_how_it_ended(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    write(path, 1)
    (line,) = path.read_text().splitlines()
    assert json.loads(line) == {
        "at": "2026-05-01T12:30:00Z",
        "by": "anna",
        "action": "pause",
        "outcome": "accepted",
        "number": 0,
        "before": "0" * 64,
    }
    assert path.stat().st_mode & 0o777 == 0o600


def test_the_chain_goes_on_in_the_next_process(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    for count in (1, 3, 2):
        write(path, count)
    assert verify_audit(path) == 6


def test_several_threads_write_one_chain(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    audit = log(path)
    threads = [
        threading.Thread(
            target=lambda: [
                audit.record(by="x", action="resume", outcome="accepted") for _ in range(10)
            ]
        )
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    audit.close()
    assert verify_audit(path) == 40


def changed(lines: list[str]) -> list[str]:
    return [lines[0].replace("anna", "otto"), *lines[1:]]


def without(lines: list[str]) -> list[str]:
    return [lines[0], *lines[2:]]


def swapped(lines: list[str]) -> list[str]:
    return [lines[1], lines[0], *lines[2:]]


@pytest.mark.parametrize("tamper", [changed, without, swapped])
def test_what_was_changed_later_shows(tmp_path: Path, tamper: object) -> None:
    path = tmp_path / "audit.jsonl"
    write(path, 4)
    lines = path.read_text().splitlines()
    path.write_text("\n".join(tamper(lines)) + "\n")  # type: ignore[operator]
    with pytest.raises(DataError, match=r"line [12] does not follow"):
        verify_audit(path)


@pytest.mark.parametrize("kept", [1, 60, -1])
def test_a_line_that_a_power_cut_left_unfinished_spoils_no_other(tmp_path: Path, kept: int) -> None:
    path, mark = tmp_path / "audit.jsonl", tmp_path / "audit.mark"
    write(path, 1)
    marked = mark.read_bytes()
    write(path, 1)
    first, second = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first + second[:kept])
    mark.write_bytes(marked)  # it tells of no line that is not on disk
    write(path, 2)
    assert verify_audit(path) == 4
    path.write_bytes(path.read_bytes().replace(b'"number": 0', b'"number": 7'))
    with pytest.raises(DataError, match="does not follow"):
        verify_audit(path)


@pytest.mark.parametrize("kept", [0, 1, 3])
def test_a_log_that_was_cut_shows_and_is_not_gone_on_with(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "audit.jsonl"
    write(path, 4)
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:kept]))
    with pytest.raises(DataError, match=r"was truncated or changed.*restore the complete log"):
        verify_audit(path)
    with pytest.raises(DataError, match="was truncated or changed"):
        log(path)
    path.unlink()
    with pytest.raises(DataError, match=r"is missing; audit\.mark beside it"):
        verify_audit(path)
    with pytest.raises(DataError, match="is missing"):
        log(path)
    assert not path.exists()
    (tmp_path / "audit.mark").unlink()  # both were put away: a new log begins
    write(path, 1)
    assert verify_audit(path) == 1


@pytest.mark.parametrize("lines", [1, 2])
def test_a_kill_between_a_line_and_its_mark_is_no_cut(tmp_path: Path, lines: int) -> None:
    path, mark = tmp_path / "audit.jsonl", tmp_path / "audit.mark"
    write(path, lines - 1)
    before = mark.read_bytes() if mark.exists() else None
    write(path, 1)
    mark.unlink()
    if before is not None:
        mark.write_bytes(before)
    assert verify_audit(path) == lines
    write(path, 1)
    assert verify_audit(path) == lines + 1


def test_a_mark_that_says_nothing_is_told_of(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    write(path, 1)
    (tmp_path / "audit.mark").write_text("{}")
    for look in (verify_audit, log):
        with pytest.raises(DataError, match=r"audit\.mark: this file does not state the length"):
            look(path)


def removed(path: Path) -> None:
    path.unlink()


def replaced(path: Path) -> None:
    raw = path.read_bytes()
    path.unlink()
    path.write_bytes(raw)


def emptied(path: Path) -> None:
    os.truncate(path, 0)


@pytest.mark.parametrize("tamper", [removed, replaced, emptied])
def test_nothing_is_done_once_the_log_was_taken_away(tmp_path: Path, tamper: object) -> None:
    path = tmp_path / "audit.jsonl"
    write(path, 2)
    audit = log(path)
    tamper(path)  # type: ignore[operator]
    with pytest.raises(DataError, match="removed, replaced or truncated while the server runs"):
        audit.record(by="x", action="stop", outcome="accepted")
    audit.close()


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_a_log_that_is_no_file_is_refused_at_once(tmp_path: Path, make: object) -> None:
    path = tmp_path / "audit.jsonl"
    make(path)  # type: ignore[operator]
    for look in (verify_audit, log):
        with pytest.raises(DataError, match="expected the audit log, found a folder, a pipe"):
            look(path)


def test_a_line_longer_than_what_is_read_at_once_is_followed(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    audit = log(path)
    audit.record(by="x", action="drain", outcome="refused: " + "y" * 200_000)
    audit.close()
    write(path, 1)
    assert verify_audit(path) == 2


def test_a_full_disk_is_said_and_leaves_no_half_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "audit.jsonl"
    write(path, 1)
    before, audit = path.read_bytes(), log(path)
    really = os.write

    def half(file: int, data: bytes) -> int:
        really(file, data[:5])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", half)
    with pytest.raises(DiskFull, match=r"audit\.jsonl"):
        audit.record(by="x", action="stop", outcome="accepted")
    monkeypatch.undo()
    assert path.read_bytes() == before
    audit.record(by="x", action="stop", outcome="accepted")
    audit.close()
    assert verify_audit(path) == 2


@pytest.mark.timeout(60)
def test_a_log_without_end_is_not_read_to_it(tmp_path: Path) -> None:
    path = tmp_path / AUDIT
    with closing(Audit(path)) as audit:
        audit.record(by="anna", action="pause")
    os.truncate(path, 1 << 40)  # takes no room
    for read in (verify_audit, Audit):
        with pytest.raises(DataError, match="was truncated or changed"):
            read(path)
    (tmp_path / MARK).unlink()
    for read in (verify_audit, Audit):
        with pytest.raises(DataError, match="check who has write"):
            read(path)
