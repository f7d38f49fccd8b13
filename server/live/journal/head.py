"""Second copy of what a journal keeps for good, and repair of a damaged journal from it.

The journal keeps only the last commits, so their copy (``head.json``) is rewritten with each. It
keeps the record of every round and the signatures of its replies, so that copy (``records.jsonl``)
is appended to: the cost of a round does not grow with the number of rounds.

SQLite's own backup would not do here. It copies all pages, those of old records and of dropped
replies too, so each commit would cost more than the last; and it replaces sound records of the
copy by damaged pages of the journal, without checking them. `backup` uses it, once per request.
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
"""Marker file next to the journal in a backup; removed when a restored run is first resumed."""
RUN, RECORD, COMMIT, END = "run", "record", "commit", "end"
COHORT, REPLY, SIGNATURE = "asked/", "reply/", "signature/"
"""Kinds of entries; the type of the message is appended to these three."""
PURPOSES = ("train", "evaluate")
"""The types of message that a round sends."""
SIGNATURES = tuple(SIGNATURE + purpose for purpose in PURPOSES)
_HISTORY = (RECORD, *SIGNATURES)
"""Kinds of entries of which the journal keeps those of every round."""
_DAMAGED, _NEW = ".damaged", ".new"
_SQLITE_SUFFIXES = ("-wal", "-shm")
"""Suffixes of the files that SQLite keeps next to a database, and replays onto it."""
_TRACES = (HEAD, RECORDS, JOURNAL + _DAMAGED)
"""Files that exist only once a run has been written to the journal."""
_MAX_BYTES = 1 << 30
_MAX_HISTORY_BYTES, _MAX_LINE_BYTES = 1 << 35, 1 << 20
"""Limits of ``records.jsonl``, which has a line of some 600 bytes for each reply of a run."""
_AFTER_ALL_ROUNDS = 2**62
"""A round number above all others."""
_COPY = "the journal's copy"
_UNREADABLE = (ValueError, TypeError, ArithmeticError, RecursionError)
"""Exceptions from parsing a malformed copy."""


def is_begun(folder: Path) -> bool:
    """Whether ``folder`` contains anything of a run: its journal, a copy, or a damaged journal."""
    return any(os.path.lexists(folder / name) for name in (JOURNAL, JOURNAL + "-wal", *_TRACES))


@dataclass(frozen=True)
class _Copy:
    entries: list[JournalEntry]
    history: list[JournalEntry]
    """The entries in ``records.jsonl``, in its order."""


def write_head(folder: Path, entries: Entries) -> None:
    """Rewrites the copy: the run's entry, its commits, its end, all records and signatures.

    Raises:
        DiskFull: the disk is full. The previous copy stays.
    """
    # Records first: after a crash the commits must never refer to records that are missing.
    write_atomic(folder / RECORDS, b"".join(map(_line, _history(entries))), mode=0o600)
    _write_commits(folder, entries)


def add_to_head(folder: Path, entries: Entries, history: Sequence[JournalEntry]) -> None:
    """Appends ``history`` to the copy of the records, and rewrites the copy of the commits.

    Args:
        folder: Folder of the journal.
        entries: The journal's entries.
        history: The round's record and signatures; empty if no round has ended.

    Raises:
        DiskFull: the disk is full. The previous copy stays valid.
    """
    if history:
        path = folder / RECORDS
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
        with disk_errors(path), os.fdopen(open_regular(path, flags, what=_COPY), "ab") as stream:
            stream.write(b"".join(map(_line, sorted(history, key=_place))))
            stream.flush()
            os.fsync(stream.fileno())
    _write_commits(folder, entries)


def shorten_head(folder: Path, entries: Entries, last: int) -> None:
    """Drops commits after round ``last`` from the copy; call it before the journal drops them.

    The order makes a crash safe: `open_repaired` updates a copy that is behind its journal, but
    rebuilds a journal that is behind its copy. Records after ``last`` stay; they are ignored.
    """
    _write_commits(folder, entries, last)


def _history(entries: Entries) -> list[JournalEntry]:
    """Returns the entries that ``records.jsonl`` must contain, in order."""
    last = _last_commit(entries.of(COMMIT))
    found = [one for kind in _HISTORY for one in entries.of(kind) if one.round <= last]
    return sorted(found, key=_place)


def _place(entry: JournalEntry) -> tuple[int, str, int]:
    return entry.round, entry.kind, entry.node


def _write_commits(folder: Path, entries: Entries, last: int = _AFTER_ALL_ROUNDS) -> None:
    kept = [one for kind in (RUN, COMMIT, END) for one in entries.of(kind) if one.round <= last]
    write_atomic(folder / HEAD, json.dumps([*map(_row, kept)]).encode(), mode=0o600)


def _row(entry: JournalEntry) -> list[str | int]:
    data = base64.b64encode(entry.data).decode()
    return [entry.kind, entry.round, entry.node, entry.doc, data, entry.sha256]


def _line(record: JournalEntry) -> bytes:
    """Returns a record as a line, newline first: a full disk may have cut off the line before."""
    return b"\n" + json.dumps(_row(record)).encode()


def _entries(rows: Iterable[Sequence[str]]) -> list[JournalEntry]:
    return [
        JournalEntry(
            str(kind), int(number), int(node), str(doc), base64.b64decode(data), str(sha256)
        )
        for kind, number, node, doc, data, sha256 in rows
    ]


def _read_head(folder: Path) -> _Copy | None:
    """Reads the copy; returns None if it is missing, incomplete or damaged in any bit."""
    path = folder / HEAD
    try:
        raw = read_bytes(path, max_bytes=_MAX_BYTES, what=_COPY)
        found = _entries(json.loads(raw))
    except (DataError, *_UNREADABLE):
        return None
    last, history = _last_commit(found), _read_records(folder)
    found += {_place(one): one for one in history if one.round <= last}.values()
    records = [entry for entry in found if entry.kind == RECORD]
    complete = len(records) == max(last, 0) and all(
        entry.round == number for number, entry in enumerate(records, start=1)
    )
    if not complete or not all(entry.is_intact for entry in found):
        return None
    return _Copy(found, history)


def _read_records(folder: Path) -> list[JournalEntry]:
    """Reads the copy of records and signatures; skips lines that cannot be parsed.

    Returns none if the file is missing, unreadable or impossibly large.
    """
    path, found = folder / RECORDS, list[JournalEntry]()
    try:
        with os.fdopen(open_regular(path, what="the records' copy"), "rb") as stream:
            if os.fstat(stream.fileno()).st_size > _MAX_HISTORY_BYTES:
                return []
            while line := stream.readline(_MAX_LINE_BYTES):
                with suppress(*_UNREADABLE):
                    found += _entries([json.loads(line)])
    except (DataError, OSError):
        return []
    return found


def copied_entries(folder: Path) -> list[JournalEntry]:
    """Returns the entries in the copy of a journal; none if it is missing or damaged."""
    copy = _read_head(folder)
    return [] if copy is None else copy.entries


def settle_restored(folder: Path) -> None:
    """Deletes the WAL files of another journal from the folder of one restored from a backup.

    A backup's journal is complete without a WAL. Files that a killed server left in the same folder
    belong to the journal before the restore, and SQLite would replay them onto the restored one.

    Raises:
        ResourceError: a file cannot be deleted.
    """
    mark = folder / RESTORED
    if not mark.is_file():
        return
    with disk_errors(mark):
        for suffix in _SQLITE_SUFFIXES:
            (folder / (JOURNAL + suffix)).unlink(missing_ok=True)
        sync_folder(folder)  # before the marker goes, so that a crash in between is harmless
        mark.unlink()
        sync_folder(folder)


def open_repaired(folder: Path) -> tuple[Entries, str]:
    """Opens the journal in ``folder`` and repairs it from its copy, or the copy from it.

    A damaged journal is renamed, and a damaged or missing one is rebuilt from the commits in its
    copy. The replies of the current round are then lost, and their nodes are asked again.

    Returns:
        The entries, and a sentence that describes the repair; empty if the journal was intact.

    Raises:
        DataError: both the journal and its copy are damaged or missing.
    """
    path, copy = folder / JOURNAL, _read_head(folder)
    head = None if copy is None else copy.entries
    if found := _not_a_file(path):  # SQLite would create an empty file, or block on a pipe
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
        why = f"{path}: the journal is empty, although a run was started."
    elif copied > kept:
        why = f"{path}: the journal ends with round {kept}, although round {copied} is complete."
    elif any(not entry.kind.startswith(REPLY) for entry in damaged):
        why = f"{path}: the journal is damaged (entries do not match their digests)."
    else:
        if damaged:
            entries.write(
                drop=[(kind, one.round, one.round) for one in damaged for kind in _pair(one)]
            )
        if copy is None or copied < kept or copy.history != _history(entries):
            write_head(folder, entries)  # a crash before the copy was written, or a damaged copy
        repairs = f"{path}: replies were damaged; those nodes will be asked again."
        return entries, repairs if damaged else ""
    entries.close()
    return _rebuilt(folder, head, why)


def _pair(reply: JournalEntry) -> tuple[str, str]:
    """Returns the kinds of a reply's entry and of its signature's."""
    return reply.kind, SIGNATURE + reply.kind.removeprefix(REPLY)


def _not_a_file(path: Path) -> str:
    """Returns why a journal's path is not a file, in a sentence; empty if it is one.

    Checks SQLite's files next to it, too.
    """
    for each in (path, *(path.with_name(path.name + suffix) for suffix in _SQLITE_SUFFIXES)):
        if each.is_symlink() and not each.exists():
            return f"{each}: expected a file of the journal, found a broken link."
        if each.exists() and not each.is_file():
            what = "a folder" if each.is_dir() else "a pipe or a device"
            return f"{each}: expected a file of the journal, found {what}."
    return "" if path.exists() else f"{path}: the journal is missing, although a run was started."


def _rebuilt(folder: Path, head: Sequence[JournalEntry] | None, why: str) -> tuple[Entries, str]:
    path = folder / JOURNAL
    if head is None:
        raise DataError(
            f"{why} Its copy in {HEAD} is also missing or damaged. Nothing was run; restore the "
            "folder from a backup and continue with --resume, or start the run over with --fresh."
        )
    # Complete the new file first: a crash leaves the old journal, the new one, or the copy.
    new = path.with_name(path.name + _NEW)
    with disk_errors(path):
        for suffix in ("", *_SQLITE_SUFFIXES):
            new.with_name(new.name + suffix).unlink(missing_ok=True)
    with closing(Entries(new)) as entries:
        entries.write(head)
    if os.path.lexists(f"{new}-wal"):  # SQLite deletes the WAL on close if it applied all of it
        raise DiskFull(
            f"{new}: the disk is full, cannot write the journal. Its copy in {HEAD} is intact, "
            "and nothing else was done; free some space there and continue with --resume."
        )
    put_aside = False
    with disk_errors(path):
        for suffix in ("", *_SQLITE_SUFFIXES):
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
        f"{why} {'It was moved aside, and round' if put_aside else 'Round'} {number} was "
        "restored from its copy; nodes will be asked again for what they had sent in round "
        f"{number + 1}."
    )


def _last_commit(entries: Sequence[JournalEntry]) -> int:
    return max((entry.round for entry in entries if entry.kind == COMMIT), default=0)
