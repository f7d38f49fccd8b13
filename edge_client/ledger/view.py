"""A device's ledger as people look at it: read as it lies there, composed, and never changed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edge_client.device_folder import DeviceFolder
from edge_client.ledger.book import (
    COUNT,
    LEDGER,
    MARK,
    Book,
    Mark,
    Runs,
    Spent,
    Terms,
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
from fedcore.privacy.accounting import Accountant, epsilon_of
from fedcore.privacy.ledger import Room, room_for

_OLD = Terms(Privacy().target_delta, "")
"""Of charges from before terms were noted."""


@dataclass(frozen=True)
class Found:
    """A device's ledger, as its files tell of it."""

    folder: Path
    runs: Runs
    """Every charge that any of them tells of."""
    problems: tuple[str, ...]
    """For which the device trains nothing with privacy."""
    notes: tuple[str, ...]
    """What cannot be compared."""
    behind: tuple[str, ...] = ()
    """What is behind the rest, and the next start of the device mends, in a few words each."""


@dataclass(frozen=True)
class Line:
    """One charge, and what its run had spent with it."""

    place: int
    """Among the charges of its run, from 1 on."""
    spent: Spent
    epsilon: float


@dataclass(frozen=True)
class RunView:
    """What one run has spent."""

    name: str
    target_delta: float
    """The least that any of its charges was counted at."""
    lines: tuple[Line, ...]
    """All, or the first and the last of them: composing takes time."""
    room: Room | None
    """How many more rounds like its latest the owner's budget has room for; None without one, and
    where the ledger is damaged."""

    @property
    def epsilon(self) -> float:
        """All of it."""
        return self.lines[-1].epsilon if self.lines else 0.0


@dataclass(frozen=True)
class Total:
    """What was spent on one kind of data, over all runs."""

    name: str
    """Of the data set; empty for the device as a whole, and for data without a name."""
    target_delta: float
    epsilon: float
    max_epsilon: float | None
    """What the owner allows; None without a limit."""
    whole: bool = True
    """False where the ledger is damaged: charges may be missing, and epsilon is the least."""

    @property
    def left(self) -> float | None:
        """Epsilon that may still be spent; None without a limit, and where it is not known."""
        if self.max_epsilon is None or not self.whole:
            return None
        return max(0.0, self.max_epsilon - self.epsilon)


@dataclass(frozen=True)
class View:
    """A ledger that was composed."""

    accountant: Accountant
    runs: tuple[RunView, ...]
    totals: tuple[Total, ...]
    """The device's, and that of each data set which the owner names."""
    problems: tuple[str, ...] = ()
    """Of the ledger: where there are any, figures are the least that was spent."""
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """For JSON; an epsilon that is no number, as no training has, stands as null."""
        return {
            "accountant": self.accountant,
            "runs": [
                {
                    "name": run.name,
                    "target_delta": run.target_delta,
                    "epsilon": _number(run.epsilon),
                    "rounds_left": run.room.rounds if run.room else None,
                    "rounds_left_exact": run.room.exact if run.room else None,
                    "charges": [
                        line.spent.model_dump() | {"epsilon": _number(line.epsilon)}
                        for line in run.lines
                    ],
                }
                for run in self.runs
            ],
            "totals": [
                asdict(total) | {"epsilon": _number(total.epsilon), "left": total.left}
                for total in self.totals
            ],
            "damaged": bool(self.problems),
            "problems": list(self.problems),
            "notes": list(self.notes),
        }


def _number(epsilon: float) -> float | None:
    return epsilon if math.isfinite(epsilon) else None


def find_ledger(folder: Path, kit: Path | None, environ: Mapping[str, str]) -> Found:
    """Reads the ledger in a device's folder and compares the places that tell of it.

    Args:
        folder: Where the device keeps its states.
        kit: The folder of its kit, for the mark and the count; None to leave these out.
        environ: As `edge_client.ledger.book.count_path` takes it.

    Raises:
        DeviceError: the folder is noted as that of another kit.
        DataError: the kit's folder holds no key.
        CertificateRefused: others may read its key, or it is none.
    """
    problems, notes, behind = list[str](), list[str](), list[str]()
    device, copied, runs = DeviceFolder(folder), None, dict[str, tuple[Spent, ...]]()
    if kit is not None:
        device.belongs_to(public_of(kit), so="Nothing was looked at")
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
    marks = dict[Path, Mark | None]()
    if kit is None:
        notes.append(f"{MARK} and {COUNT} were not compared: --kit names the device's kit.")
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
    return Found(folder, runs, said, tuple(notes), tuple(behind))


def public_of(kit: Path) -> bytes:
    """The public key of the device whose kit is in a folder.

    Raises:
        DataError: there is no key.
        CertificateRefused: others may read it, or it is none.
    """
    if not (kit / KEY).is_file():
        raise DataError(
            f"{kit / KEY}: there is no such file, so {kit} is no folder of a device's kit. Nothing "
            "was looked at; name with --kit the folder that `fedcore client enrol` made."
        )
    return public_bytes(load_key(kit / KEY))


def mark_paths(kit: Path, environ: Mapping[str, str], notes: list[str]) -> list[Path]:
    """The mark in a kit, and the count for its key; ``notes`` hears what has no place."""
    counted = count_path(public_of(kit), environ)
    if counted is None:
        notes.append(
            f"This machine has no place for {COUNT}: neither XDG_STATE_HOME nor HOME names one. "
            "Should kit and state be put back together, nobody will notice."
        )
    return [kit / MARK, *([counted] if counted else [])]


def _behind(name: str, copied: Book | None, spent: Sequence[Spent]) -> list[str]:
    held = len(copied.runs.get(name, ())) if copied else 0
    if held < len(spent):
        lacks = f"{LEDGER} lacks {len(spent) - held} of the charges of run {name!r}"
    elif held > len(spent):
        lacks = f"the state of run {name!r} lacks {held - len(spent)} of its charges"
    else:
        return []
    return [lacks]


def view_of(
    found: Found, owner: OwnerPolicy, accountant: Accountant, *, most_lines: int | None = None
) -> View:
    """Composes a ledger, by run and over all of them.

    Where the ledger is damaged, whatever comes out is the least that was spent.

    Epsilon of a run is at the least delta that any of its charges was counted at; totals are at the
    owner's, or, where it sets none, at the least of all.

    Args:
        found: The ledger.
        owner: Whose budget holds.
        accountant: How charges are composed.
        most_lines: Of a run; all of them when None.
    """
    totals = tuple(
        _total(found, owner, name, accountant)
        for name in ("", *(one.name for one in owner.datasets))
    )
    runs = tuple(
        _run(name, spent, found, owner, accountant, most_lines or len(spent))
        for name, spent in sorted(found.runs.items())
        if spent
    )
    return View(accountant, runs, totals, found.problems, found.notes)


def _run(
    name: str,
    spent: Sequence[Spent],
    found: Found,
    owner: OwnerPolicy,
    accountant: Accountant,
    most_lines: int,
) -> RunView:
    delta = min(one.target_delta for one in spent)
    lines = tuple(
        Line(place, one, _epsilon(spent[:place], delta, accountant))
        for place, one in enumerate(spent, 1)
        if place <= most_lines // 2 or place > len(spent) - -(-most_lines // 2)
    )
    data = name_in(spent[-1].data)
    limit, there = _limit(found, owner, data), _counted(found, data)
    left = None
    if limit is not None and not found.problems:
        budget = _privacy(accountant, _delta(there, owner), limit)
        left = room_for([one.charge for one in there], spent[-1].charge, budget)
    return RunView(name, delta, lines, left)


def _total(found: Found, owner: OwnerPolicy, name: str, accountant: Accountant) -> Total:
    there = _counted(found, name)
    delta = _delta(there, owner)
    limit = _limit(found, owner, name)
    return Total(name, delta, _epsilon(there, delta, accountant), limit, not found.problems)


def _counted(found: Found, name: str) -> list[Spent]:
    """The charges that count against data of a name; all of them for data without one."""
    every = [one for spent in found.runs.values() for one in spent]
    names = _names(found, name)
    if names is None:
        return every
    return [one for one in every if not name_in(one.data) or name_in(one.data) in names]


def _names(found: Found, name: str) -> set[str] | None:
    labels = {one.data for spent in found.runs.values() for one in spent}
    contents = read_contents(found.folder)
    if name and not contents.names.get(name):
        return {name}  # nothing was trained on it yet
    return counted_with(name, labels, contents)


def _limit(found: Found, owner: OwnerPolicy, name: str) -> float | None:
    names = _names(found, name)
    return owner.budget({"", *(one.name for one in owner.datasets)} if names is None else names)


def _delta(there: Sequence[Spent], owner: OwnerPolicy) -> float:
    least = min((one.target_delta for one in there), default=Privacy().target_delta)
    return owner.target_delta or least


def _epsilon(there: Sequence[Spent], delta: float, accountant: Accountant) -> float:
    charges = [one.charge for one in there]
    return epsilon_of(charges, target_delta=delta, accountant=accountant)


def _privacy(accountant: Accountant, delta: float, max_epsilon: float) -> Privacy:
    return Privacy(
        unit="example", accountant=accountant, target_delta=delta, max_epsilon=max_epsilon
    )
