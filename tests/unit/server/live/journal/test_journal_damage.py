"""What is left of a journal after damage."""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from fedcore.errors import DataError
from server.live.journal import head as journal_head
from server.live.journal.entries import Entries, new_entry
from server.live.journal.head import HEAD, JOURNAL, RECORDS
from server.live.journal.journal import create, reopen
from tests.unit.server.live.journal.journals import (
    IDENTITY,
    LARGE,
    SMALL,
    answer,
    asked,
    opened,
    progress,
    record,
    two_rounds,
    vector,
    weights_of,
)


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
        assert "restored from its copy" in journal.mended
        assert journal.start is not None
        assert journal.start.progress.weights.tobytes() == vector(2, size).tobytes()
        assert journal.start.records == (record(1), record(2))
        assert journal.reply(asked(5)) is None
    with opened(tmp_path) as journal:
        assert journal.mended == "", "it is mended for good"


def a_folder(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.mkdir()


def a_pipe(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def a_loop(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to(path.name)


@pytest.mark.parametrize(
    ("become", "what"),
    [(a_folder, "found a folder"), (a_pipe, "found a pipe"), (a_loop, "a broken link")],
)
@pytest.mark.parametrize("suffix", ["", "-wal", "-shm"])
def test_what_is_no_file_is_named_and_put_aside(
    tmp_path: Path, become: Callable[[Path], None], what: str, suffix: str
) -> None:
    two_rounds(tmp_path)
    path = tmp_path / f"{JOURNAL}{suffix}"
    become(path)
    with opened(tmp_path) as journal:
        assert journal.mended.startswith(f"{path}: ")
        assert what in journal.mended
        assert journal.round == 2
    assert os.path.lexists(f"{path}.damaged")


@pytest.mark.parametrize("at", range(1, 10))
def test_whenever_a_mending_dies_the_next_one_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    two_rounds(tmp_path)
    (tmp_path / JOURNAL).write_bytes(b"nothing like it")
    (tmp_path / f"{JOURNAL}-wal").write_bytes(b"nor this")
    left = at

    def dying(real: Callable[..., object]) -> Callable[..., object]:
        def call(*arguments: object, **more: object) -> object:
            nonlocal left
            left -= 1
            if not left:
                raise KeyboardInterrupt
            return real(*arguments, **more)

        return call

    with monkeypatch.context() as patched:
        for name in ("sync_folder", "write_atomic", "Entries"):
            patched.setattr(journal_head, name, dying(getattr(journal_head, name)))
        patched.setattr(Path, "replace", dying(Path.replace))
        with pytest.raises(KeyboardInterrupt):
            reopen(tmp_path)
    with opened(tmp_path) as journal:
        assert journal.round == 2
        assert journal.start is not None
        assert journal.start.records == (record(1), record(2))


def test_an_emptied_journal_without_its_copy_is_refused(tmp_path: Path) -> None:
    two_rounds(tmp_path)
    (tmp_path / JOURNAL).write_bytes(b"")
    (tmp_path / HEAD).write_bytes(b"")
    with pytest.raises(DataError, match=r"is empty, although a run was started.* --fresh"):
        reopen(tmp_path)


def test_without_its_copy_a_damaged_journal_is_refused(tmp_path: Path) -> None:
    two_rounds(tmp_path)
    (tmp_path / JOURNAL).write_bytes(b"nothing like it")
    flip(tmp_path / HEAD, 400)
    with pytest.raises(DataError, match=r"restore the folder .* --fresh"):
        reopen(tmp_path)


def test_a_damaged_copy_is_made_again(tmp_path: Path) -> None:
    two_rounds(tmp_path)
    before = (tmp_path / HEAD).read_bytes()
    (tmp_path / HEAD).write_bytes(before[: len(before) // 2])
    with opened(tmp_path) as journal:
        assert journal.mended == ""
    assert (tmp_path / HEAD).read_bytes() == before


def test_the_hundredth_round_is_copied_at_the_price_of_the_third(tmp_path: Path) -> None:
    head, records = tmp_path / HEAD, tmp_path / RECORDS
    with closing(create(tmp_path, IDENTITY)) as journal:
        journal.commit(progress(0), None)
        for number in range(1, 101):
            before, file = records.stat().st_size, records.stat().st_ino
            journal.commit(progress(number), record(number))
            assert records.stat().st_ino == file, "it is added to, not written again"
            assert records.stat().st_size - before < 1000
            if number == 3:
                third = head.stat().st_size
    assert head.stat().st_size < third + 100
    (tmp_path / JOURNAL).write_bytes(b"nothing like it")
    with opened(tmp_path) as journal:
        assert journal.start is not None
        assert journal.start.records == tuple(map(record, range(1, 101)))


@pytest.mark.parametrize("left", [b"", b"\nstale"])
@pytest.mark.parametrize("damaged", [False, True])
def test_a_copy_that_holds_more_than_the_journal_is_read_and_made_again(
    tmp_path: Path, left: bytes, damaged: bool
) -> None:
    two_rounds(tmp_path)
    whole = (tmp_path / RECORDS).read_bytes()
    (tmp_path / RECORDS).write_bytes(whole + whole + left)
    if damaged:
        (tmp_path / JOURNAL).write_bytes(b"nothing like it")
    with opened(tmp_path) as journal:
        assert bool(journal.mended) == damaged
        assert (tmp_path / RECORDS).read_bytes() == whole
        journal.commit(progress(3), record(3))
    (tmp_path / JOURNAL).write_bytes(b"nothing like it")
    with opened(tmp_path) as journal:
        assert journal.round == 3
        assert journal.start is not None
        assert journal.start.records == (record(1), record(2), record(3))


@pytest.mark.parametrize("until", ["commit", "half a line", "record"])
def test_a_copy_that_lags_behind_stands_until_the_journal_is_opened(
    tmp_path: Path, until: str
) -> None:
    """Whatever is written of the third round's copy, that of the second can be gone back to."""
    two_rounds(tmp_path)
    head = (tmp_path / HEAD).read_bytes()
    with opened(tmp_path) as journal:
        journal.commit(progress(3), record(3))
    grown = (tmp_path / RECORDS).read_bytes()
    two = grown[: grown.rindex(b"\n")]
    left = {"commit": two, "half a line": grown[:-20], "record": grown}[until]
    (tmp_path / HEAD).write_bytes(head)
    (tmp_path / RECORDS).write_bytes(left)
    whole = (tmp_path / JOURNAL).read_bytes()
    (tmp_path / JOURNAL).write_bytes(b"nothing like it")
    with opened(tmp_path) as journal:
        assert journal.round == 2
        assert (tmp_path / RECORDS).read_bytes() == two
    (tmp_path / JOURNAL).write_bytes(whole)
    (tmp_path / RECORDS).write_bytes(left)
    with opened(tmp_path) as journal:
        assert (journal.round, journal.mended) == (3, "")
        journal.commit(progress(4), record(4))
    (tmp_path / JOURNAL).write_bytes(b"nothing like it")
    with opened(tmp_path) as journal:
        assert journal.round == 4
        assert journal.start is not None
        assert journal.start.records == tuple(map(record, range(1, 5)))


def test_a_records_copy_that_is_damaged_is_made_again_or_refused(tmp_path: Path) -> None:
    two_rounds(tmp_path)
    whole = (tmp_path / RECORDS).read_bytes()
    flip(tmp_path / RECORDS, 60)
    with opened(tmp_path) as journal:
        assert journal.mended == ""
    assert (tmp_path / RECORDS).read_bytes() == whole
    flip(tmp_path / RECORDS, 60)
    (tmp_path / JOURNAL).write_bytes(b"nothing like it")
    with pytest.raises(DataError, match=r"restore the folder .* --fresh"):
        reopen(tmp_path)


def test_damaged_weights_are_found_and_the_round_before_stands(tmp_path: Path) -> None:
    two_rounds(tmp_path, LARGE)
    for path in (tmp_path / "values").iterdir():
        if path.read_bytes()[: 4 * LARGE] == vector(2, LARGE).tobytes():
            flip(path, 1000)
    with opened(tmp_path) as journal:
        assert "continues after round 1" in journal.mended
        assert journal.start is not None
        assert journal.start.progress.weights.tobytes() == vector(1, LARGE).tobytes()
        assert journal.start.records == (record(1),)
        assert journal.asked("train") is None
        journal.commit(progress(2, LARGE, best_round=1), record(2, 0.7))
    (tmp_path / JOURNAL).write_bytes(b"nothing like it")
    with opened(tmp_path) as journal:
        assert journal.start is not None
        assert journal.start.records == (record(1), record(2, 0.7)), "not the one that was dropped"


def test_where_no_weights_are_whole_it_is_refused(tmp_path: Path) -> None:
    two_rounds(tmp_path, LARGE)
    for path in (tmp_path / "values").iterdir():
        path.write_bytes(b"")
    with pytest.raises(DataError, match="No round's weights are intact"):
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


def rewritten(folder: Path, kind: str, values: object) -> None:
    """An entry whose digest fits, and which no version of fedcore has written."""
    with closing(Entries(folder / JOURNAL)) as entries:
        (*_, old) = entries.of(kind)
        entries.write([new_entry(kind, old.round, old.node, values, old.data)])  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["run", "record", "asked/train"])
@pytest.mark.parametrize("values", [[], {}, {"nodes": 5, "round": "x", "arrays": [[1]]}, None])
def test_what_its_digest_fits_is_still_looked_at(tmp_path: Path, kind: str, values: object) -> None:
    two_rounds(tmp_path)
    rewritten(tmp_path, kind, values)
    wrong = pytest.raises(DataError, match=r"does not have the format of this version|format None")
    with wrong, opened(tmp_path) as journal:
        journal.asked("train")


@pytest.mark.parametrize("values", [[], {}, {"round": "x", "arrays": [[1]]}, None])
def test_a_commit_that_no_version_wrote_gives_way_to_the_one_before(
    tmp_path: Path, values: object
) -> None:
    two_rounds(tmp_path)
    rewritten(tmp_path, "commit", values)
    with opened(tmp_path) as journal:
        assert "does not have the format of this version" in journal.mended
        assert "continues after round 1" in journal.mended
        assert journal.start is not None
        assert journal.start.progress.round == 1


def test_a_copy_that_tells_of_very_many_rounds_takes_no_memory(tmp_path: Path) -> None:
    two_rounds(tmp_path)
    head = json.loads((tmp_path / HEAD).read_text())
    for row in head:
        row[1] = 10**15
    (tmp_path / HEAD).write_text(json.dumps(head))
    with opened(tmp_path) as journal:
        assert journal.start is not None
        assert journal.start.progress.round == 2


def test_a_history_larger_than_commits_may_be_still_mends_a_journal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has a line for each reply, so it grows with devices times rounds."""
    two_rounds(tmp_path)
    (tmp_path / JOURNAL).write_bytes(b"nothing like it")
    limit_bytes = (tmp_path / HEAD).stat().st_size
    monkeypatch.setattr(journal_head, "_MAX_BYTES", limit_bytes)
    with (tmp_path / RECORDS).open("ab") as stream:
        stream.write(b"\n" * limit_bytes)
    with opened(tmp_path) as journal:
        assert "restored from its copy" in journal.mended
        assert journal.round == 2


def test_a_number_that_is_none_makes_no_line_of_the_copy_readable(tmp_path: Path) -> None:
    two_rounds(tmp_path)
    with (tmp_path / RECORDS).open("a") as stream:
        stream.write('\n["record", Infinity, 0, "{}", "", ""]\n' + "[" * 100_000)
    with opened(tmp_path) as journal:
        assert journal.start is not None
        assert len(journal.start.records) == 2


def test_a_name_in_a_damaged_journal_that_is_no_text_is_damage_like_any_other(
    tmp_path: Path,
) -> None:
    two_rounds(tmp_path)
    with closing(sqlite3.connect(tmp_path / JOURNAL)) as database:
        database.execute("pragma journal_mode = delete")  # all of it in one file
    raw = (tmp_path / JOURNAL).read_bytes()
    assert b"tableentry" in raw
    (tmp_path / JOURNAL).write_bytes(raw.replace(b"tableentry", b"tableent\xc5y"))
    with opened(tmp_path) as journal:
        assert "names in it are not text" in journal.mended
        assert journal.round == 2


@pytest.mark.parametrize(
    "change", ["data = 7", "data = 'text'", "sha256 = x'00'", "round = 1.5", "kind = x'6b'"]
)
def test_a_value_that_is_of_another_type_is_damage_like_any_other(
    tmp_path: Path, change: str
) -> None:
    two_rounds(tmp_path)
    with closing(sqlite3.connect(tmp_path / JOURNAL)) as database:
        database.execute(f"update entry set {change} where kind = 'reply/train'")
        database.commit()
    with opened(tmp_path) as journal:
        assert "an entry has wrong types" in journal.mended
        assert journal.round == 2
