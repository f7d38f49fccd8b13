"""Read-only view of a device's privacy ledger: reads the files, and computes epsilons for display.

`read_ledger_files` reads and compares the files; `view_of` composes the charges.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from edge_client.device_folder import DeviceFolder
from edge_client.ledger.book import (
    COUNT,
    LEDGER,
    MARK,
    ChargeTerms,
    LedgerFile,
    LedgerMark,
    Runs,
    StoredCharge,
    against_marks,
    count,
    count_path,
    mark_of,
    merged,
    read_book,
    read_mark,
    states_of,
)
from edge_client.ledger.contents import counted_with, name_in, read_contents
from fedcore.config.owner import OwnerPolicy
from fedcore.config.run import Privacy
from fedcore.crypto.keys import load_key, public_bytes
from fedcore.crypto.kit import KEY
from fedcore.errors import DataError, FedcoreError, PrivacyError
from fedcore.finite import finite_or_none
from fedcore.privacy.accounting import Accountant, Charge, epsilon_of
from fedcore.privacy.ledger import RemainingRounds, remaining_charges

_OLD = ChargeTerms(Privacy().target_delta, "")
"""Terms of charges by versions of fedcore that stored none."""
_MOST_ROOMS = 64
"""Most runs in a ledger for which `RunView.room` is computed."""


@dataclass(frozen=True)
class LedgerFiles:
    """A device's ledger as read from its files, by `fedcore.verify_ledger`.

    Example::

        files = fedcore.verify_ledger("kit")
        files.charges, files.problems, files.behind
    """

    folder: Path
    runs: Runs
    """Every charge in any of the files."""
    problems: tuple[str, ...]
    """Faults that keep the device from training with privacy."""
    notes: tuple[str, ...]
    """Files that could not be compared, and why."""
    behind: tuple[str, ...] = ()
    """Files that are out of date, which the device's next start repairs."""

    @property
    def charges(self) -> int:
        """Number of charges over all runs."""
        return sum(map(len, self.runs.values()))


@dataclass(frozen=True)
class ChargeView:
    """One charge, and its run's epsilon so far."""

    place: int
    """Position among the charges of its run, from 1 on."""
    spent: StoredCharge
    epsilon: float
    """Epsilon of all charges of the run up to this one."""


@dataclass(frozen=True)
class RunView:
    """Privacy spent in one run."""

    name: str
    target_delta: float
    """The least delta of any of its charges."""
    lines: tuple[ChargeView, ...]
    """All charges, or only the first and last ones: composing each takes time."""
    room: RemainingRounds | None
    """How many more rounds like the latest fit in the owner's budget; None without a budget, if
    the ledger is damaged, or in a ledger of more than 64 runs, where counting takes too long."""

    @property
    def epsilon(self) -> float:
        """Epsilon of all charges of the run."""
        return self.lines[-1].epsilon if self.lines else 0.0


@dataclass(frozen=True)
class Total:
    """Privacy spent on one data set, or on the whole device, over all runs."""

    name: str
    """Name of the data set; empty for the whole device, which includes data without a name."""
    target_delta: float
    epsilon: float
    max_epsilon: float | None
    """The owner's budget; None without a limit."""
    whole: bool = True
    """False if the ledger is damaged: charges may be missing, so epsilon is a lower bound."""

    @property
    def left(self) -> float | None:
        """Epsilon left in the budget; None without a limit, or if the ledger is damaged."""
        if self.max_epsilon is None or not self.whole:
            return None
        return max(0.0, self.max_epsilon - self.epsilon)


@dataclass(frozen=True)
class LedgerView:
    """A ledger with its charges composed to epsilons, from `fedcore.read_ledger`.

    Example::

        ledger = fedcore.read_ledger("kit", owner="owner.toml")
        ledger.totals[0].epsilon  # of the whole device, over all runs
        ledger.plot("ledger.png")
    """

    accountant: Accountant
    runs: tuple[RunView, ...]
    totals: tuple[Total, ...]
    """The whole device's first, then one for each data set in the owner's policy."""
    problems: tuple[str, ...] = ()
    """Faults of the ledger; if there are any, all epsilons are lower bounds."""
    notes: tuple[str, ...] = ()
    """Files that could not be compared, and why."""

    def plot(self, file: str | PathLike[str]) -> None:
        """Draws epsilon by round, a curve per run, with the owner's budget as a line.

        Args:
            file: Image file, ``.png``, ``.pdf`` or ``.svg``.

        Raises:
            ConfigError: the file's suffix is another.
            ResourceError: matplotlib is not installed, or the file cannot be written.
        """
        from edge_client.ledger.plot import check_plot, plot_ledger

        check_plot(Path(file))
        plot_ledger(self, Path(file))

    def to_dict(self) -> dict[str, Any]:
        """Returns the view for JSON; an infinite epsilon, from an altered file, becomes null."""
        return {
            "accountant": self.accountant,
            "runs": [
                {
                    "name": run.name,
                    "target_delta": run.target_delta,
                    "epsilon": finite_or_none(run.epsilon),
                    "rounds_left": run.room.rounds if run.room else None,
                    "rounds_left_exact": run.room.exact if run.room else None,
                    "charges": [
                        line.spent.model_dump() | {"epsilon": finite_or_none(line.epsilon)}
                        for line in run.lines
                    ],
                }
                for run in self.runs
            ],
            "totals": [
                asdict(total) | {"epsilon": finite_or_none(total.epsilon), "left": total.left}
                for total in self.totals
            ],
            "damaged": bool(self.problems),
            "problems": list(self.problems),
            "notes": list(self.notes),
        }


def read_ledger_files(folder: Path, kit: Path | None, environ: Mapping[str, str]) -> LedgerFiles:
    """Reads the ledger in a device's folder, and compares all files that record charges.

    Args:
        folder: The device's folder.
        kit: Folder of the device's kit, to find the marks; None skips them.
        environ: Environment variables (see `edge_client.ledger.book.count_path`).

    Raises:
        DeviceError: the folder belongs to the identity of another kit.
        DataError: the kit's folder contains no key.
        CertificateRefused: other users can read the key, or the file is not a key.
    """
    problems, notes, behind = list[str](), list[str](), list[str]()
    device, copied, runs = DeviceFolder(folder), None, dict[str, tuple[StoredCharge, ...]]()
    if kit is not None:
        device.belongs_to(public_of(kit), so="Nothing was read")
    try:
        copied = read_book(folder)
        runs = dict(copied.runs) if copied else {}
    except FedcoreError as error:
        problems.append(str(error))
    for name in device.runs():
        try:
            states = states_of([name], device.state, _OLD)
            whole = merged(runs, states, folder)
        except FedcoreError as error:
            problems.append(str(error))
            continue
        behind += _behind(name, copied, states[name][0])
        runs = whole
    marks = dict[Path, LedgerMark | None]()
    if kit is None:
        notes.append(f"{MARK} and {COUNT} were not compared: pass the device's kit with --kit.")
    for path in mark_paths(kit, environ, notes) if kit else ():
        try:
            marks[path] = read_mark(path)
        except PrivacyError as error:
            problems.append(str(error))
    problems += map(str, against_marks(folder, runs, marks))
    if not problems:
        behind += [
            f"{path} is {'not there' if mark is None else 'behind'}"
            for path, mark in marks.items()
            if mark != mark_of(runs) and (count(runs) or mark is not None)
        ]
    said = tuple(dict.fromkeys(problems))
    return LedgerFiles(folder, runs, said, tuple(notes), tuple(behind))


def public_of(kit: Path) -> bytes:
    """Reads the public key of the device whose kit is in a folder.

    Raises:
        DataError: the folder contains no key.
        CertificateRefused: other users can read the key, or the file is not a key.
    """
    if not (kit / KEY).is_file():
        raise DataError(
            f"{kit / KEY}: there is no such file, so {kit} is not the folder of a device's kit. "
            "Nothing was read; pass the folder created by `fedcore client enrol` with --kit."
        )
    return public_bytes(load_key(kit / KEY))


def mark_paths(kit: Path, environ: Mapping[str, str], notes: list[str]) -> list[Path]:
    """Returns the paths of ``ledger.mark`` and ``ledger.count`` for a kit.

    If the machine has no place for ``ledger.count``, leaves it out and adds a note to ``notes``.

    Raises:
        DataError: the kit's folder contains no key.
        CertificateRefused: other users can read the key, or the file is not a key.
    """
    counted = count_path(public_of(kit), environ)
    if counted is None:
        notes.append(
            f"This machine has no place for {COUNT}: neither XDG_STATE_HOME nor HOME is set. If "
            "kit and state are replaced by earlier copies together, that will go undetected."
        )
    return [kit / MARK, *([counted] if counted else [])]


def _behind(name: str, copied: LedgerFile | None, spent: Sequence[StoredCharge]) -> list[str]:
    held = len(copied.runs.get(name, ())) if copied else 0
    if held < len(spent):
        lacks = f"{LEDGER} lacks {len(spent) - held} of the charges of run {name!r}"
    elif held > len(spent):
        lacks = f"the state of run {name!r} lacks {held - len(spent)} of its charges"
    else:
        return []
    return [lacks]


def view_of(
    found: LedgerFiles, owner: OwnerPolicy, accountant: Accountant, *, max_lines: int | None = None
) -> LedgerView:
    """Composes the charges of a ledger to epsilons, by run, by data set and for the device.

    If the ledger is damaged, all epsilons are lower bounds. A run's epsilon is at the least delta
    of its charges; a total is at the owner's delta or, without one, at the least delta of its
    charges.

    Args:
        found: The ledger.
        owner: Policy with the budgets.
        accountant: Method of composition.
        max_lines: Most charges to list per run; all of them when None.
    """
    sets = _DataSets(found, owner)
    totals = tuple(
        _total(sets.of(name), name, accountant)
        for name in ("", *(one.name for one in owner.datasets))
    )
    charged = [(name, spent) for name, spent in sorted(found.runs.items()) if spent]
    counts_room = len(charged) <= _MOST_ROOMS
    runs = tuple(
        _run(
            name,
            spent,
            sets.of(name_in(spent[-1].data)) if counts_room else None,
            accountant,
            max_lines or len(spent),
        )
        for name, spent in charged
    )
    return LedgerView(accountant, runs, totals, found.problems, found.notes)


@dataclass(frozen=True)
class _DataSet:
    """All charges that count against the budget of one data set."""

    charges: tuple[Charge, ...]
    target_delta: float
    limit: float | None
    whole: bool


class _DataSets:
    """The charges of a ledger by data set, each put together once."""

    def __init__(self, found: LedgerFiles, owner: OwnerPolicy) -> None:
        self._found, self._owner = found, owner
        self._every = [one for spent in found.runs.values() for one in spent]
        self._labels = {one.data for one in self._every}
        self._contents = read_contents(found.folder)
        self._known: dict[str, _DataSet] = {}

    def of(self, name: str) -> _DataSet:
        """Returns the charges for a data set; all of them for data without a name."""
        if name not in self._known:
            self._known[name] = self._counted(name)
        return self._known[name]

    def _counted(self, name: str) -> _DataSet:
        names: set[str] | None = {name}  # nothing was trained on it yet
        if not name or self._contents.names.get(name):
            names = counted_with(name, self._labels, self._contents)
        there = [
            one
            for one in self._every
            if names is None or not name_in(one.data) or name_in(one.data) in names
        ]
        least = min((one.target_delta for one in there), default=Privacy().target_delta)
        everybody = {"", *(one.name for one in self._owner.datasets)}
        return _DataSet(
            tuple(one.charge for one in there),
            self._owner.target_delta or least,
            self._owner.budget(everybody if names is None else names),
            not self._found.problems,
        )


def _run(
    name: str,
    spent: Sequence[StoredCharge],
    data: _DataSet | None,
    accountant: Accountant,
    max_lines: int,
) -> RunView:
    charges = [one.charge for one in spent]
    delta = min(one.target_delta for one in spent)
    lines = tuple(
        ChargeView(place, one, _epsilon(charges[:place], delta, accountant))
        for place, one in enumerate(spent, 1)
        if place <= max_lines // 2 or place > len(spent) - -(-max_lines // 2)
    )
    left = None
    rounds = [one for one in charges if not one.evaluates]
    if rounds and data is not None and data.limit is not None and data.whole:
        budget = _privacy(accountant, data.target_delta, data.limit)
        left = remaining_charges(data.charges, rounds[-1], budget)
    return RunView(name, delta, lines, left)


def _total(data: _DataSet, name: str, accountant: Accountant) -> Total:
    epsilon = _epsilon(data.charges, data.target_delta, accountant)
    return Total(name, data.target_delta, epsilon, data.limit, data.whole)


def _epsilon(charges: Sequence[Charge], delta: float, accountant: Accountant) -> float:
    return epsilon_of(charges, target_delta=delta, accountant=accountant)


def _privacy(accountant: Accountant, delta: float, max_epsilon: float) -> Privacy:
    return Privacy(
        unit="example", accountant=accountant, target_delta=delta, max_epsilon=max_epsilon
    )
