"""Privacy charges of a device over all runs: a server that renames its run gets no new budget.

Each run's state contains its charges, and is written with the reply that they pay for.
``ledger.json``, next to the states, is a copy of the charges of all runs. Two marks record the
number of charges and each run's latest: ``ledger.mark`` in the kit's folder, and ``ledger.count``
elsewhere on the machine. A state that was removed or restored from a backup is repaired from the
copy. If the copy is missing too, or a second copy of the device has trained, the marks reveal it,
and the device trains nothing.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from flwr.app import RecordDict

from edge_client.device_folder import DeviceFolder
from edge_client.ledger.book import (
    LEDGER,
    MARK,
    MAX_CHARGES,
    MAX_RUNS,
    ChargeTerms,
    LedgerFile,
    LedgerMark,
    Runs,
    check_marks,
    count,
    count_path,
    mark_of,
    merged,
    new_terms,
    put_terms,
    read_book,
    read_mark,
    spent_in,
    states_of,
    terms_in,
)
from edge_client.ledger.contents import (
    counted_with,
    label_of,
    name_in,
    read_contents,
    record_contents,
)
from fedcore.config.owner import OwnerPolicy, tighten
from fedcore.config.run import Privacy, RunConfig
from fedcore.crypto.kit import Kit
from fedcore.errors import DataError, DiskFull, LedgerFull, PrivacyError, ResourceError
from fedcore.files import lock_folder, remove_unfinished, write_atomic
from fedcore.observability.words import counted
from fedcore.privacy.ledger import (
    FULL,
    Ledger,
    OtherRuns,
    RemainingRounds,
    ledger_in,
    put_ledger,
    remaining_rounds,
)

log = logging.getLogger("fedcore.device")

IDLE_RUNS = 256
"""Most states kept of runs without charges: removing one loses only its stored replies."""


@dataclass(frozen=True)
class DeviceLedger:
    """The charges of one run, counted together with those of the device's other runs."""

    folder: DeviceFolder
    mark: Path
    """Path of ``ledger.mark``: outside ``folder``, so the two are not lost or restored together."""
    counted: Path | None
    """Path of ``ledger.count``, outside ``folder`` and the kit; None if there is no such place."""
    run: RunConfig
    """The run's settings from the server, before the owner's limits."""
    owner: OwnerPolicy
    data: Path | None
    """Folder of the training data; None if the task itself locates them."""

    def open(self, state: RecordDict) -> OtherRuns:
        """Returns the charges of other runs on the same data; repairs ``state`` and the copies.

        Data sets count as different only if the owner names them and they share no file.

        Args:
            state: This run's state; missing charges are restored from ``ledger.json``.

        Raises:
            PrivacyError: charges cannot be read, are missing, or differ between copies.
            LedgerFull: this run has no charge yet, and the ledger has its maximum of runs.
            DataError: the state of a run, or a file of a named data set, cannot be read.
            ResourceError: the ledger or a mark cannot be written.
        """
        named = self.owner.data_set(self.data)
        name = named.name if named else ""
        if named is not None and not record_contents(self.folder.path, name, named.folder):
            log.warning(
                "%s contains no files: data set %r counts against the budgets of all data sets",
                named.path,
                name,
            )
        with self._exclusive_lock():
            book = self._repair(state)
        if self.run.name not in book and len(book) >= MAX_RUNS:
            raise LedgerFull(
                f"{self.folder.path / LEDGER}: run {self.run.name!r} is new, but this device's "
                f"ledger already contains {counted(len(book), 'run')}, the limit is {MAX_RUNS}. "
                f"{FULL}"
            )
        contents = read_contents(self.folder.path)
        labels = {one.data for spent in book.values() for one in spent}
        names = counted_with(name, labels, contents)
        here = [
            (run, one)
            for run, spent in book.items()
            for one in spent
            if names is None or not name_in(one.data) or name_in(one.data) in names
        ]
        everybody = {"", *(one.name for one in self.owner.datasets)}
        return OtherRuns(
            tuple(one.charge for run, one in here if run != self.run.name),
            min((one.target_delta for _, one in here), default=1.0),
            self.owner.budget(everybody if names is None else names),
            max(0, MAX_CHARGES - count(book) + len(book.get(self.run.name, ()))),
        )

    def scan_data(self) -> bool:
        """Records the files of the owner's named data set; returns whether any is new.

        Returns:
            False if the owner names no data set for this run's data.

        Raises:
            PrivacyError: the data set has too many files or bytes.
            DataError: a file cannot be read.
            DiskFull: there is no room.
        """
        named = self.owner.data_set(self.data)
        if named is None:
            return False
        before = label_of(named.name, read_contents(self.folder.path).names.get(named.name, ()))
        return record_contents(self.folder.path, named.name, named.folder) != before

    def commit(self, state: RecordDict) -> None:
        """Writes the charges in ``state`` durably to the state's file and the copies.

        Call it before training. Does nothing for a run without charges.

        Raises:
            PrivacyError: the ledger has become unreadable, or another copy of this device has
                trained.
            DiskFull: there is no room.
        """
        noted, made = terms_in(state), len(ledger_in(state).charges)
        if not made:
            return
        if made > len(noted):
            new = self._terms
            more = (new_terms(new.target_delta, new.data) for _ in range(made - len(noted)))
            put_terms(state, [*noted, *more])
        self.folder.keep_state(self.run.name, state)
        with self._exclusive_lock():
            self._repair(state, only_own=True)

    def remaining_rounds(self, state: RecordDict, others: OtherRuns) -> RemainingRounds | None:
        """Returns how many more rounds like the latest fit in the privacy budget, if limited."""
        return remaining_rounds(ledger_in(state), self._privacy, owner=self._here, others=others)

    def _repair(self, state: RecordDict, *, only_own: bool = False) -> Runs:
        """Returns all charges of all runs, and writes them wherever on disk one is missing.

        Args:
            state: This run's state; missing charges are restored in it.
            only_own: Whether to trust ``ledger.json`` for the other runs, if it is complete,
                instead of reading all their states.
        """
        name, terms = self.run.name, self._terms
        copied = read_book(self.folder.path)
        marks = {path: read_mark(path) for path in self._marks}
        marked = max((mark.charges for mark in marks.values() if mark is not None), default=0)
        whole = only_own and copied is not None and count(copied.runs) >= marked
        names = [] if whole else [one for one in self.folder.runs() if one != name]
        states = states_of(names, self.folder.state, terms) | {
            name: (spent_in(state, terms), len(terms_in(state)))
        }
        book = merged(copied.runs if copied else {}, states, self.folder.path)
        check_marks(self.folder.path, book, marks)
        own = book.get(name, ())
        if missing := len(own) - len(ledger_in(state).charges):
            log.warning(
                "%s: the state of run %r lacks %s that %s has: it was removed, or replaced by an "
                "earlier copy. The charges count; lost replies are computed and charged again.",
                self.folder.path,
                name,
                counted(missing, "charge"),
                LEDGER,
            )
            put_ledger(state, Ledger(tuple(one.charge for one in own)))
            put_terms(state, [ChargeTerms(one.target_delta, one.data, one.id) for one in own])
        if copied is None or copied.runs != book:
            raw = LedgerFile(runs={run: tuple(spent) for run, spent in book.items()})
            where = self.folder.path / LEDGER
            write_atomic(where, raw.model_dump_json().encode() + b"\n", mode=0o600)
        for path, mark in marks.items():
            if mark != mark_of(book):
                self._write_mark(path, mark_of(book), new=mark is None)
        return book

    def _write_mark(self, path: Path, mark: LedgerMark, *, new: bool) -> None:
        try:
            write_atomic(path, mark.model_dump_json().encode() + b"\n", mode=0o600)
        except DiskFull:
            raise
        except (ResourceError, OSError) as error:
            if path != self.counted or not new:
                raise
            log.warning(
                "%s cannot be written (%s): if this device's kit and its folder are both "
                "replaced by earlier copies at once, that will go undetected. Set XDG_STATE_HOME "
                "to another place for it.",
                path,
                error,
            )

    @property
    def _marks(self) -> list[Path]:
        return [self.mark, *([self.counted] if self.counted else [])]

    @property
    def _here(self) -> OwnerPolicy:
        return self.owner.on(self.data)

    @property
    def _privacy(self) -> Privacy:
        return tighten(self.run, self._here).privacy

    @property
    def _terms(self) -> ChargeTerms:
        """Delta and data label of a charge made now; the id is empty."""
        named = self.owner.data_set(self.data)
        label = ""
        if named is not None:
            digests = read_contents(self.folder.path).names.get(named.name, ())
            label = label_of(named.name, digests)
        return ChargeTerms(self._privacy.target_delta, label)

    @contextmanager
    def _exclusive_lock(self) -> Iterator[None]:
        """Locks the ledger against a second copy of this device on this machine."""
        if self.counted is None or not _made(self.counted.parent):
            yield
            return
        busy = PrivacyError(
            f"{self.counted.parent}: another process with this device's key is using its ledger. "
            "Nothing was sent; stop one of the two."
        )
        with lock_folder(self.counted.parent, busy):
            remove_unfinished(self.counted.parent)
            remove_unfinished(self.mark.parent, MARK)
            yield


def drop_idle(folder: DeviceFolder, *, before: str) -> None:
    """Removes the oldest states of runs without charges, beyond `IDLE_RUNS`.

    A server that opens run after run must not fill the disk.

    Args:
        folder: The device's folder.
        before: The run about to be opened; nothing is removed if it already has a state.

    Raises:
        ResourceError: a state cannot be removed.
    """
    known = folder.runs()
    if len(known) <= IDLE_RUNS or before in known:
        return
    try:
        book = read_book(folder.path)
    except PrivacyError:
        book = None  # then each state is read below
    charged = book.runs if book is not None else {}
    idle = [run for run in folder.runs_by_age() if run not in charged]
    for run in idle[:-IDLE_RUNS]:
        try:
            spent = ledger_in(folder.state(run)).charges
        except (DataError, PrivacyError):
            continue  # keep it: it may contain charges
        if not spent:
            folder.drop_state(run)


def ledger_of(
    folder: DeviceFolder, kit: Kit, owner: OwnerPolicy, run: RunConfig, data: Path | None
) -> DeviceLedger:
    """Returns the ledger of a run on a device, with the paths of its marks."""
    counted = count_path(kit.public, os.environ)
    return DeviceLedger(folder, kit.folder / MARK, counted, run, owner, data)


def _made(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError:
        return False  # writing the count reports it
    return True
