"""Storage of the journal's entries in SQLite: JSON documents with arrays, each with a digest.

`JournalEntry` is one row, `new_entry` builds one, and `Entries` is the file. `format_checked` and
`sqlite_errors` turn damage into errors of `fedcore.errors`.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedcore.errors import DataError, DiskFull, FedcoreError, ResourceError
from fedcore.files import disk_errors
from fedcore.observability.foreign import foreign

_SCHEMA = """
create table if not exists entry (
    kind text not null, round integer not null, node integer not null,
    doc text not null, data blob not null, sha256 text not null,
    primary key (kind, round, node)
) without rowid
"""
_TYPES = (str, int, int, str, bytes, str)
_LAST_ROUND = 2**63 - 1  # the largest integer of SQLite
_FIELDS = "kind, round, node, doc, data, sha256"
_FORMAT_ERRORS = (
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)


@dataclass(frozen=True)
class JournalEntry:
    """One event of a run, such as a commit or a reply; kind, round and node are its unique key.

    ``sha256`` covers all other fields, so damage to any of them is detected.
    """

    kind: str
    round: int
    node: int
    """Node that the event belongs to; 0 if it belongs to none."""
    doc: str
    """A JSON object."""
    data: bytes
    """Small arrays, concatenated; ``doc`` contains their offsets."""
    sha256: str

    @property
    def values(self) -> dict[str, Any]:
        """The parsed ``doc``.

        Raises:
            DataError: ``doc`` is not a JSON object.
        """
        with format_checked(self):
            values = json.loads(self.doc)
            if not isinstance(values, dict):
                raise TypeError(f"it is a {type(values).__name__}")
        return values

    @property
    def is_intact(self) -> bool:
        """Whether ``sha256`` matches the other fields."""
        return self.sha256 == _digest(self.kind, self.round, self.node, self.doc, self.data)


@contextmanager
def format_checked(entry: JournalEntry) -> Iterator[None]:
    """Context manager that turns errors from reading a malformed document into a `DataError`.

    A valid digest excludes damage, but not a document written by another version of fedcore, or by
    another user with write access to the folder.

    Raises:
        DataError: the entry does not have the form that this version writes.
    """
    try:
        yield
    except FedcoreError:
        raise
    except _FORMAT_ERRORS as error:
        raise _format_error(entry, error) from None


def _format_error(entry: JournalEntry, error: Exception) -> DataError:
    return DataError(
        f"journal: entry {foreign(entry.kind, 40)!r} of round {entry.round} does not have the "
        f"format of this version ({type(error).__name__}: {foreign(error, 100)}). It was not "
        "used; if the run cannot continue without it, restore the folder from a backup."
    )


def new_entry(
    kind: str, number: int, node: int, values: Mapping[str, Any], data: bytes = b""
) -> JournalEntry:
    """Returns an entry with ``values`` as JSON and its digest. Floats, NaN too, stay bit-exact."""
    doc = json.dumps(values)
    return JournalEntry(kind, number, node, doc, data, _digest(kind, number, node, doc, data))


def _digest(kind: str, number: int, node: int, doc: str, data: bytes) -> str:
    head = json.dumps([kind, number, node, doc]).encode()
    found = hashlib.sha256(len(head).to_bytes(8, "big") + head)
    found.update(data)
    return found.hexdigest()


@contextmanager
def sqlite_errors(path: Path) -> Iterator[None]:
    """Context manager that turns errors of SQLite into errors of `fedcore.errors`.

    Raises:
        DiskFull: the disk is full.
        DataError: the file is damaged.
        ResourceError: the file cannot be read or written for another reason.
    """
    try:
        yield
    except sqlite3.Error as error:
        raise _typed_error(path, error) from error
    except UnicodeDecodeError as error:  # SQLite's message quotes a name that is not valid UTF-8
        raise DataError(f"{path}: the journal is damaged (names in it are not text).") from error


def _typed_error(path: Path, error: sqlite3.Error) -> FedcoreError:
    code = getattr(error, "sqlite_errorcode", 0)
    if code in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR_WRITE):
        return DiskFull(
            f"{path}: the disk is full, cannot write the journal ({error}). Its contents are "
            "intact, and nothing else was done; free some space there and continue with --resume."
        )
    if code & 0xFF in (sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY):
        return ResourceError(
            f"{path}: cannot read or write the journal ({error}). Its contents are intact; "
            "repair the disk and continue with --resume."
        )
    return DataError(f"{path}: the journal is damaged ({error}).")


def _normal(row: Sequence[str | None]) -> tuple[str, ...]:
    """Returns a row of SQLite's schema for comparison; a view or a check may run without end."""
    return tuple(" ".join(str(one).lower().replace("if not exists", "").split()) for one in row)


class Entries:
    """SQLite file of journal entries. Each change is on disk when its method returns.

    Only one process may have the file open, and only one thread at a time may call methods.
    """

    def __init__(self, path: Path) -> None:
        """Opens ``path``; creates it if it does not exist.

        Raises:
            DataError: the structure of the database is damaged.
            DiskFull: the disk is full.
        """
        self.path = path
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with sqlite_errors(path):
            self._connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        try:
            self._prepare()
        except BaseException:
            self._connection.close()
            raise

    def _prepare(self) -> None:
        with sqlite_errors(self.path):
            # Durable with one fsync per transaction; a crash leaves the last complete transaction.
            found = self._connection.execute("select type, name, sql from sqlite_schema").fetchall()
            if not {*map(_normal, found)} <= {_normal(("table", "entry", _SCHEMA))}:
                raise DataError(
                    f"{self.path}: the journal is damaged (it does not consist of the one table "
                    "of a journal)."
                )
            self._connection.execute("pragma journal_mode = wal")
            self._connection.execute("pragma synchronous = full")
            (found,) = self._connection.execute("pragma integrity_check(1)").fetchone()
            if found != "ok":
                raise DataError(f"{self.path}: the journal is damaged ({found}).")
            self._connection.execute(_SCHEMA)

    def close(self) -> None:
        """Closes the file."""
        self._connection.close()

    def write(
        self, new: Sequence[JournalEntry] = (), *, drop: Sequence[tuple[str, int, int]] = ()
    ) -> None:
        """Deletes and then adds entries in one transaction; replaces entries with the same key.

        Args:
            new: Entries to add.
            drop: (kind, first round, last round) of entries to delete, bounds included.
        """
        with self._transaction():
            for kind, first, last in drop:
                self._connection.execute(
                    "delete from entry where kind = ? and round between ? and ?",
                    (kind, first, last),
                )
            for entry in new:
                self._connection.execute(
                    f"insert or replace into entry ({_FIELDS}) values (?, ?, ?, ?, ?, ?)",  # noqa: S608
                    (entry.kind, entry.round, entry.node, entry.doc, entry.data, entry.sha256),
                )

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        with sqlite_errors(self.path):
            self._connection.execute("begin immediate")
            try:
                yield
                self._connection.execute("commit")
            except BaseException:
                if self._connection.in_transaction:
                    self._connection.execute("rollback")
                raise

    def remove(self, keys: Sequence[tuple[str, int, int]]) -> None:
        """Deletes the entries with these keys, as far as there are any, in one transaction."""
        with self._transaction():
            self._connection.executemany(
                "delete from entry where kind = ? and round = ? and node = ?", keys
            )

    def of(self, kind: str, number: int | None = None) -> list[JournalEntry]:
        """Returns the entries of a kind in a round, or in all rounds; ordered by round and node."""
        within = (0, _LAST_ROUND) if number is None else (number, number)
        with sqlite_errors(self.path):
            rows = self._connection.execute(
                f"select {_FIELDS} from entry where kind = ? and round between ? and ? "  # noqa: S608
                "order by round, node",
                (kind, *within),
            ).fetchall()
        return [self._entry(row) for row in rows]

    def one(self, kind: str, number: int, node: int) -> JournalEntry | None:
        """Returns the entry with this key, or None."""
        with sqlite_errors(self.path):
            row = self._connection.execute(
                f"select {_FIELDS} from entry where kind = ? and round = ? and node = ?",  # noqa: S608
                (kind, number, node),
            ).fetchone()
        return self._entry(row) if row else None

    def damaged(self) -> list[JournalEntry]:
        """Returns all entries whose digests do not match."""
        with sqlite_errors(self.path):
            # One row at a time: there are as many as a run has replies.
            rows = self._connection.execute(f"select {_FIELDS} from entry")  # noqa: S608
            return [entry for entry in map(self._entry, rows) if not entry.is_intact]

    def _entry(self, row: tuple[Any, ...]) -> JournalEntry:
        """Converts a row; checks types, as one flipped bit can change the type of a value."""
        if tuple(map(type, row)) != _TYPES:
            raise DataError(f"{self.path}: the journal is damaged (an entry has wrong types).")
        return JournalEntry(*row)
