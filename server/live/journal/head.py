"""A second copy of what a journal's commits hold, and what is mended from it.

Commits are few, and their copy is written whole with each. Records stay, one a round, so that their
copy is only ever added to: a round costs the same however many came before it.
"""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Iterable, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path

from fedcore.errors import DataError, DiskFull
from fedcore.files import disk_errors, open_regular, read_bytes, sync_folder, write_atomic
from server.live.journal.entries import Entries, JournalEntry

HEAD, RECORDS = "head.json", "records.jsonl"
JOURNAL = "journal.sqlite"
RESTORED = "restored"
"""A file that a backup has beside its journal, for as long as nobody has gone on with it."""
RUN, RECORD, COMMIT, END, ASKED, REPLY = "run", "record", "commit", "end", "asked/", "reply/"
"""Kinds of entries; the last two are followed by the type of the message."""
_DAMAGED, _NEW = ".damaged", ".new"
_BESIDE = ("-wal", "-shm")
"""What SQLite keeps beside a database, and replays over it."""
_TRACES = (HEAD, RECORDS, JOURNAL + _DAMAGED)
"""What is there only once the journal has held a run."""
_MAX_BYTES = 1 << 30
_NEVER = 2**62
"""A round that is after all others."""
_COPY = "the journal's copy"
_UNREADABLE = (ValueError, TypeError, ArithmeticError, RecursionError)
"""What parsing a copy raises that is not as it was written."""


def is_begun(folder: Path) -> bool:
    """Whether a run has left anything in ``folder`` that it may be gone on from, or lost by."""
    return any(os.path.lexists(folder / name) for name in (JOURNAL, JOURNAL + "-wal", *_TRACES))


@dataclass(frozen=True)
class _Copy:
    entries: list[JournalEntry]
    can_grow: bool
    """Whether the next record may follow those that are there. It may not where records came from
    elsewhere: from a version that kept them with the commits, or with a backup."""


def write_head(folder: Path, entries: Entries) -> None:
    """Writes what is needed to go on after the last commit.

    Raises:
        DiskFull: there was no room; the copy before stands.
    """
    # Records first: those that the commits need are there whenever it dies.
    write_atomic(folder / RECORDS, b"".join(map(_line, entries.of(RECORD))), mode=0o600)
    _write_commits(folder, entries)


def add_to_head(folder: Path, entries: Entries, record: JournalEntry | None) -> None:
    """As `write_head`, where ``record`` is all that has come to the records since.

    Raises:
        DiskFull: there was no room; the copy before stands.
    """
    if record is not None:
        path = folder / RECORDS
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
        with disk_errors(path), os.fdopen(open_regular(path, flags, what=_COPY), "ab") as stream:
            stream.write(_line(record))
            stream.flush()
            os.fsync(stream.fileno())
    _write_commits(folder, entries)


def shorten_head(folder: Path, entries: Entries, last: int) -> None:
    """Leaves commits out of the copy that came after round ``last``, before the journal drops them.

    A copy that is behind its journal is written again when that is opened. One that is ahead of it
    would be taken for what the journal has lost. What its records have beyond harms nobody.
    """
    _write_commits(folder, entries, last)


def _write_commits(folder: Path, entries: Entries, last: int = _NEVER) -> None:
    kept = [one for kind in (RUN, COMMIT, END) for one in entries.of(kind) if one.round <= last]
    write_atomic(folder / HEAD, json.dumps([*map(_row, kept)]).encode(), mode=0o600)


def _row(entry: JournalEntry) -> list[str | int]:
    data = base64.b64encode(entry.data).decode()
    return [entry.kind, entry.round, entry.node, entry.doc, data, entry.sha256]


def _line(record: JournalEntry) -> bytes:
    """Begins with the end of the line before, which a full disk may have cut off."""
    return b"\n" + json.dumps(_row(record)).encode()


def _entries(rows: Iterable[Sequence[str]]) -> list[JournalEntry]:
    return [
        JournalEntry(
            str(kind), int(number), int(node), str(doc), base64.b64decode(data), str(sha256)
        )
        for kind, number, node, doc, data, sha256 in rows
    ]


def _read_head(folder: Path) -> _Copy | None:
    """The copy; None when there is none, or a single bit of it is wrong."""
    path = folder / HEAD
    try:
        raw = read_bytes(path, max_bytes=_MAX_BYTES, what=_COPY)
        found = _entries(json.loads(raw))
    except (DataError, *_UNREADABLE):
        return None
    last, added = _last_commit(found), _read_records(folder)
    if not any(entry.kind == RECORD for entry in found):
        found += {one.round: one for one in added if one.round <= last}.values()
    records = [entry for entry in found if entry.kind == RECORD]
    complete = len(records) == max(last, 0) and all(
        entry.round == number for number, entry in enumerate(records, start=1)
    )
    if not complete or not all(entry.is_intact for entry in found):
        return None
    return _Copy(found, can_grow=records == added)


def _read_records(folder: Path) -> list[JournalEntry]:
    """The lines of the copy's records, but for what cannot be read, as one that was cut off."""
    path, found = folder / RECORDS, list[JournalEntry]()
    try:
        lines = read_bytes(path, max_bytes=_MAX_BYTES, what="the records' copy").splitlines()
    except DataError:
        return found
    for line in lines:
        with suppress(*_UNREADABLE):
            found += _entries([json.loads(line)])
    return found


def settle_restored(folder: Path) -> None:
    """Removes what a later process left beside a journal that came from a backup.

    A backup's journal is whole by itself; what was left by a server that was killed belongs to
    another, and SQLite would replay it over the one that was restored.

    Raises:
        ResourceError: it may not be removed.
    """
    mark = folder / RESTORED
    if not mark.is_file():
        return
    with disk_errors(mark):
        for suffix in _BESIDE:
            (folder / (JOURNAL + suffix)).unlink(missing_ok=True)
        sync_folder(folder)  # before the mark: whatever dies in between, the rest is not replayed
        mark.unlink()
        sync_folder(folder)


def open_repaired(folder: Path) -> tuple[Entries, str]:
    """The entries in ``folder``, and what had to be mended, in a sentence; empty when nothing had.

    A damaged journal is put aside, and its commits are taken from their copy, as they are where it
    is missing. Updates of the round that was going on are lost then, and are asked for again.

    Raises:
        DataError: it is damaged or missing, and so is the copy, or there is none.
    """
    path, copy = folder / JOURNAL, _read_head(folder)
    head = None if copy is None else copy.entries
    if found := _unlike_a_file(path):  # SQLite would begin an empty one, or wait for a pipe's end
        return _rebuilt(folder, head, found)
    try:
        entries = Entries(path)
    except DataError as error:
        return _rebuilt(folder, head, str(error))
    try:
        damaged = entries.damaged()
        kept = _last_commit(entries.of(COMMIT))
    except DataError as error:
        entries.close()
        return _rebuilt(folder, head, str(error))
    copied = _last_commit(head or ())
    if not entries.of(RUN) and any(os.path.lexists(folder / name) for name in _TRACES):
        why = f"{path}: the journal is empty, and a run was begun."
    elif copied > kept:
        why = f"{path}: the journal ends with round {kept}, and round {copied} is over."
    elif any(not entry.kind.startswith(REPLY) for entry in damaged):
        why = f"{path}: the journal is damaged (entries do not match their digests)."
    else:
        if damaged:
            entries.write(drop=[(entry.kind, entry.round, entry.round) for entry in damaged])
        if copy is None or copied < kept or not copy.can_grow:
            write_head(folder, entries)  # it died between the two, or the copy is damaged
        told = f"{path}: replies were damaged; those nodes are asked again."
        return entries, told if damaged else ""
    entries.close()
    return _rebuilt(folder, head, why)


def _unlike_a_file(path: Path) -> str:
    """What is wrong with the names of a journal, in a sentence; empty where nothing is."""
    for each in (path, *(path.with_name(path.name + suffix) for suffix in _BESIDE)):
        if each.is_symlink() and not each.exists():
            return f"{each}: this link leads to no file, and the journal is expected here."
        if each.exists() and not each.is_file():
            what = "a folder" if each.is_dir() else "a pipe or a device"
            return f"{each}: this is {what}, and a file of the journal is expected here."
    return "" if path.exists() else f"{path}: the journal is missing, and a run was begun."


def _rebuilt(folder: Path, head: Sequence[JournalEntry] | None, why: str) -> tuple[Entries, str]:
    path = folder / JOURNAL
    if head is None:
        raise DataError(
            f"{why} Its copy in {HEAD} is missing or damaged, too. Nothing was run; restore the "
            "folder from a backup and go on with --resume, or begin the run again with --fresh."
        )
    # Whole beside it first: whatever dies in between, what is found is one of the two, or the copy.
    new = path.with_name(path.name + _NEW)
    with disk_errors(path):
        for suffix in ("", *_BESIDE):
            new.with_name(new.name + suffix).unlink(missing_ok=True)
    with closing(Entries(new)) as entries:
        entries.write(head)
    if os.path.lexists(f"{new}-wal"):  # SQLite removes it as it closes, once all of it is in place
        raise DiskFull(
            f"{new}: the disk has no room for the journal. What its copy in {HEAD} holds stands, "
            "and nothing else was done; free space there, and go on with --resume."
        )
    put_aside = False
    with disk_errors(path):
        for suffix in ("", *_BESIDE):
            part = path.with_name(path.name + suffix)
            if os.path.lexists(part):
                part.replace(part.with_name(part.name + _DAMAGED))
                put_aside = True
        sync_folder(folder)
        new.replace(path)
        sync_folder(folder)
    entries = Entries(path)
    write_head(folder, entries)
    number = _last_commit(head)
    return entries, (
        f"{why} {'It was put aside, and round' if put_aside else 'Round'} {number} was taken from "
        f"its copy; what nodes had sent in round {number + 1} is asked for again."
    )


def _last_commit(entries: Sequence[JournalEntry]) -> int:
    return max((entry.round for entry in entries if entry.kind == COMMIT), default=0)
