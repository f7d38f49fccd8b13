"""Journals of a live run, and a device's state: folders whose files were damaged or made up."""

from __future__ import annotations

import json
import shutil
import sqlite3
import tempfile
from contextlib import closing
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

from fedcore.flower.identity import assume_identity
from server.live.journal.entries import _digest
from server.live.journal.head import HEAD, JOURNAL, RECORDS
from server.live.journal.journal import create, reopen
from server.rounds.cohort import Cohort
from tests.fuzz.mutate import damage, damaged, packed, parsed, unpacked, written
from tests.unit.server.live.journal.journals import IDENTITY, answer, asked, progress, record

_WORDS = ("train", "commit", "array", "|u1", "<f4", "|O", "FedAvgM", "model", "record", "0" * 64)
_COLUMNS = ("kind", "round", "node", "doc", "data", "sha256")


@cache
def _files() -> dict[str, bytes]:
    """Of a run with two rounds that are over, and one in which a node has answered."""
    assume_identity(1)
    with tempfile.TemporaryDirectory(prefix="fedcore-fuzz-") as made:
        folder = Path(made)
        with closing(create(folder, IDENTITY)) as journal:
            journal.commit(progress(0), None)
            for number in (1, 2):
                journal.record_cohort("train", Cohort([5, 6], dict.fromkeys([5, 6], 7)))
                journal.accept(answer(asked(5), 0.5))
                journal.commit(progress(number), record(number))
            journal.record_cohort("train", Cohort([5, 6], dict.fromkeys([5, 6], 7)))
            journal.accept(answer(asked(5), 0.5))
        with closing(sqlite3.connect(folder / JOURNAL)) as database:
            database.execute("pragma journal_mode = delete")  # all of it in one file
        return {name: (folder / name).read_bytes() for name in (JOURNAL, HEAD, RECORDS)}


def make(rng: Random) -> bytes:
    """The files of a journal. One that lies in its entries gives them digests that fit."""
    files = dict(_files())
    for _ in range(rng.choice((1, 1, 1, 2))):
        name = rng.choice((JOURNAL, JOURNAL, JOURNAL, HEAD, RECORDS))
        kind = rng.randrange(8)
        if kind == 0:
            files.pop(name, None)
        elif kind == 1 or name not in files:
            files[name] = damaged(rng, files.get(name, b""))
        elif files[name] != _files()[name]:
            continue  # it has its share
        elif name == JOURNAL:
            files[name] = _odd_entries(rng, files[name])
        else:
            files[name] = _odd_copy(rng, files[name], lines=name == RECORDS)
    if rng.randrange(30) == 0:
        files[rng.choice(("restored", JOURNAL + "-wal", JOURNAL + "-shm"))] = damaged(
            rng, b"x" * 99
        )
    return packed([part for name, raw in files.items() for part in (name.encode(), raw)])


def _odd_entries(rng: Random, raw: bytes) -> bytes:
    database = sqlite3.connect(":memory:")
    with closing(database):
        database.deserialize(raw)
        rows = database.execute(f"select {', '.join(_COLUMNS)} from entry").fetchall()
        for _ in range(rng.choice((1, 1, 2))):
            old = rng.choice(rows)
            new = _odd_row(rng, old)
            key = "kind = ? and round = ? and node = ?"
            try:
                database.execute(f"delete from entry where {key}", old[:3])
                database.execute("insert or replace into entry values (?, ?, ?, ?, ?, ?)", new)
            except (sqlite3.Error, UnicodeEncodeError, OverflowError):
                continue
        database.commit()
        return database.serialize()


def _odd_row(rng: Random, row: tuple[Any, ...]) -> tuple[Any, ...]:
    kind, number, node, doc, data, sha256 = row
    what = rng.randrange(10)
    if what < 6:
        doc = written(damage(rng, parsed(doc.encode()), _WORDS)).decode(errors="replace")
    elif what == 6:
        data = damaged(rng, data)
    elif what == 7:
        number = rng.choice((number + 1, 0, 2**62, -1, 9))
    elif what == 8:
        kind = rng.choice(("commit", "asked/train", "reply/train", "record", "end", "run", "\x1b"))
    else:
        node = rng.choice((0, 5, 6, -1, 2**62))
    if rng.randrange(5):
        sha256 = _digest(kind, number, node, doc, data)
    return kind, number, node, doc, data, sha256


def _odd_copy(rng: Random, raw: bytes, *, lines: bool) -> bytes:
    if not lines:
        return written(damage(rng, parsed(raw), _WORDS))
    held = raw.splitlines()
    place = rng.randrange(len(held))
    if held[place]:
        held[place] = written(damage(rng, parsed(held[place]), _WORDS))
    rng.shuffle(held)
    return b"\n".join(held)


_FOLDER = tempfile.TemporaryDirectory(
    prefix="fedcore-fuzz-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None
)


def read(raw: bytes) -> None:
    """As `fedcore server --resume` reads it."""
    assume_identity(1)
    folder = Path(_FOLDER.name) / "journal"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    parts = unpacked(raw)
    for name, content in zip(parts[::2], parts[1::2], strict=True):
        (folder / name.decode()).write_bytes(content)
    journal = reopen(folder)
    if journal is None:
        return
    with closing(journal):
        json.dumps(journal.identity)
        assert journal.repairs.isprintable(), journal.repairs
        assert len(journal.repairs) < 2000
        journal.rounds_kept()
        journal.selected_cohort("train")
        if journal.start is not None:
            assert journal.start.progress.weights.dtype is not None
        for node in (5, 6):
            journal.reply(asked(node))
    with closing(reopen(folder) or journal):  # what was mended stays so
        pass
