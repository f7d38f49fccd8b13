"""What is left of a journal after damage."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from fedcore.errors import DataError
from fedcore.flower.identity import assume_identity
from server.journal import (
    reopen,
)
from server.journal_head import HEAD, JOURNAL
from tests.unit.server.journals import (
    LARGE,
    SMALL,
    answer,
    asked,
    opened,
    record,
    two_rounds,
    vector,
    weights_of,
)


@pytest.fixture(autouse=True)
def _flowers_identity() -> None:
    assume_identity(1)


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
