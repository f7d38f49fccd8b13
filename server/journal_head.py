"""A second copy of what a journal's commits hold, and what is mended from it."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Sequence
from pathlib import Path

from fedcore.errors import DataError
from fedcore.files import disk_errors, read_bytes, sync_folder, write_atomic
from server.entries import Entries, Entry

HEAD = "head.json"
JOURNAL = "journal.sqlite"
RESTORED = "restored"
"""A file that a backup has beside its journal, for as long as nobody has gone on with it."""
RUN, RECORD, COMMIT, END, ASKED, REPLY = "run", "record", "commit", "end", "asked/", "reply/"
"""Kinds of entries; the last two are followed by the type of the message."""
_DAMAGED = ".damaged"
_BESIDE = ("-wal", "-shm")
"""What SQLite keeps beside a database, and replays over it."""
_MAX_BYTES = 1 << 30


def write_head(folder: Path, entries: Entries) -> None:
    """Writes what is needed to go on after the last commit.

    Raises:
        DiskFull: there was no room; the copy before stands.
    """
    held = [entry for kind in (RUN, RECORD, COMMIT, END) for entry in entries.of(kind)]
    rows = [
        [
            *(entry.kind, entry.round, entry.node, entry.doc),
            *(base64.b64encode(entry.data).decode(), entry.sha256),
        ]
        for entry in held
    ]
    write_atomic(folder / HEAD, json.dumps(rows).encode(), mode=0o600)


def read_head(folder: Path) -> list[Entry] | None:
    """The entries of the copy; None when there is none, or a single bit of it is wrong."""
    path = folder / HEAD
    if not path.is_file():
        return None
    try:
        rows = json.loads(read_bytes(path, max_bytes=_MAX_BYTES, what="the journal's copy"))
        found = [
            Entry(str(kind), int(number), int(node), str(doc), base64.b64decode(data), str(sha256))
            for kind, number, node, doc, data, sha256 in rows
        ]
    except (ValueError, TypeError, binascii.Error):
        return None
    whole = {entry.round for entry in found if entry.kind == RECORD}
    complete = whole == set(range(1, _last_commit(found) + 1))
    return found if complete and all(entry.is_intact for entry in found) else None


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


def open_mended(folder: Path) -> tuple[Entries, str]:
    """The entries in ``folder``, and what had to be mended, in a sentence; empty when nothing had.

    A damaged journal is put aside, and its commits are taken from their copy. Updates of the round
    that was going on are lost then, and are asked for again.

    Raises:
        DataError: it is damaged, and so is the copy, or there is none.
    """
    path, head = folder / JOURNAL, read_head(folder)
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
    if copied > kept:
        why = f"{path}: the journal ends with round {kept}, and round {copied} is over."
    elif any(not entry.kind.startswith(REPLY) for entry in damaged):
        why = f"{path}: the journal is damaged (entries do not match their digests)."
    elif damaged:
        entries.write(drop=[(entry.kind, entry.round, entry.round) for entry in damaged])
        return entries, f"{path}: replies were damaged; those nodes are asked again."
    else:
        if head is None or copied < kept:
            write_head(folder, entries)  # it died between the two, or the copy is damaged
        return entries, ""
    entries.close()
    return _rebuilt(folder, head, why)


def _rebuilt(folder: Path, head: Sequence[Entry] | None, why: str) -> tuple[Entries, str]:
    path = folder / JOURNAL
    if head is None:
        raise DataError(
            f"{why} Its copy in {HEAD} is missing or damaged, too. Nothing was run; restore the "
            "folder from a backup and go on with --resume, or begin the run anew with --fresh."
        )
    with disk_errors(path):
        for suffix in ("", *_BESIDE):
            part = path.with_name(path.name + suffix)
            if part.exists():
                part.replace(part.with_name(part.name + _DAMAGED))
        sync_folder(folder)
    entries = Entries(path)
    entries.write(head)
    number = _last_commit(head)
    return entries, (
        f"{why} It was put aside, and round {number} taken from its copy; what nodes had sent in "
        f"round {number + 1} is asked for again."
    )


def _last_commit(entries: Sequence[Entry]) -> int:
    return max((entry.round for entry in entries if entry.kind == COMMIT), default=0)
