"""Files of a device's privacy ledger: their formats, and how they are read, merged and compared.

Four places record charges: the states of the runs, ``ledger.json`` next to them, ``ledger.mark`` in
the kit's folder, and ``ledger.count`` elsewhere on the machine. The first two contain every charge.
The other two record only how many there are and each run's latest, which reveals a restored backup
or a second copy of the device. Nothing here writes a file.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from flwr.app import ConfigRecord, RecordDict
from pydantic import Field, ValidationError

from fedcore.config.section import Fraction, Section
from fedcore.crypto.keys import fingerprint
from fedcore.errors import DataError, PrivacyError
from fedcore.files import read_if_exists
from fedcore.observability.faults import first_fault
from fedcore.observability.words import counted
from fedcore.privacy.accounting import Charge
from fedcore.privacy.ledger import ledger_in

LEDGER, MARK, COUNT = "ledger.json", "ledger.mark", "ledger.count"
MAX_RUNS = 1 << 12
"""Most runs with charges on a device: one a day for eleven years. Each costs a file, an entry in
the marks, and time at every start."""
MAX_CHARGES = 8 * MAX_RUNS
"""Most charges over all runs: a round each hour for almost four years."""
_MAX_LEDGER_BYTES = MAX_CHARGES << 11
_MAX_MARK_BYTES = MAX_RUNS << 12
"""Size limits for reading: several times the longest entries, so every written file is readable."""
_RECORD, _TERMS = "fedcore.charged", "terms"
_File = TypeVar("_File", bound=Section)


class StoredCharge(Section):
    """One charge as stored: the parameters of a round's mechanism, and the terms it was made on."""

    round: int
    noise_multiplier: Annotated[float, Field(gt=0)]
    sample_rate: Annotated[float, Field(gt=0, le=1)]
    steps: Annotated[int, Field(ge=0)]
    part: Annotated[str, Field(pattern=r"^([0-9a-f]{16}/(train|heldout))?$")] = ""
    """Label of the examples that it is about (see `fedcore.privacy.accounting.Charge`); empty for
    all, also in old ledgers."""
    target_delta: Fraction
    """The run's delta when the charge was made."""
    data: str
    """Label of the named data set, from `edge_client.ledger.contents.label_of`; any other text
    counts against all data."""
    id: Annotated[str, Field(pattern=r"^[0-9a-f]{0,32}$")] = ""
    """Random id, by which charges of a second copy of this device differ; empty in old ledgers."""

    @property
    def charge(self) -> Charge:
        """The part that an accountant composes."""
        return Charge(self.round, self.noise_multiplier, self.sample_rate, self.steps, self.part)


class LedgerFile(Section):
    """Content of ``ledger.json``: all charges, by run."""

    format: Literal["fedcore.ledger/1"] = "fedcore.ledger/1"
    runs: dict[str, tuple[StoredCharge, ...]]


class LedgerMark(Section):
    """Content of ``ledger.mark`` and ``ledger.count``: a summary of all charges."""

    format: Literal["fedcore.mark/1"] = "fedcore.mark/1"
    charges: Annotated[int, Field(ge=0)]
    latest: dict[str, str] = Field(default_factory=dict)
    """Id of each run's latest charge, by run; without runs whose latest charge has no id."""


@dataclass(frozen=True)
class ChargeTerms:
    """Delta, data label and id of a charge, as stored in the state of its run."""

    target_delta: float
    data: str
    id: str = ""


Runs = Mapping[str, Sequence[StoredCharge]]


def count_path(public: bytes, environ: Mapping[str, str]) -> Path | None:
    """Returns the path of a device's ``ledger.count``, outside its kit and its folder.

    Args:
        public: The device's public key, as `fedcore.crypto.keys.public_bytes` gives it.
        environ: Environment variables: ``XDG_STATE_HOME`` sets the base folder, by default
            ``$HOME/.local/state``.

    Returns:
        The path; None if neither variable is an absolute path.
    """
    home, base = environ.get("HOME", ""), environ.get("XDG_STATE_HOME", "")
    if not base.startswith("/"):  # the XDG specification ignores relative paths
        if not home.startswith("/"):
            return None
        base = f"{home}/.local/state"
    return Path(base) / "fedcore" / "devices" / fingerprint(public)[:32] / COUNT


def read_book(folder: Path) -> LedgerFile | None:
    """Reads ``ledger.json`` in a device's folder; None if it does not exist.

    Raises:
        PrivacyError: the file cannot be read.
    """
    return _read(folder / LEDGER, LedgerFile, _MAX_LEDGER_BYTES)


def read_mark(path: Path) -> LedgerMark | None:
    """Reads a ``ledger.mark`` or ``ledger.count``; None if it does not exist.

    Raises:
        PrivacyError: the file cannot be read.
    """
    return _read(path, LedgerMark, _MAX_MARK_BYTES)


def spent_in(state: RecordDict, otherwise: ChargeTerms) -> tuple[StoredCharge, ...]:
    """Returns the charges in a state, with ``otherwise`` as the terms of charges without any.

    Raises:
        PrivacyError: the charges cannot be read.
    """
    charges, terms = ledger_in(state).charges, terms_in(state)
    terms = terms[: len(charges)] + [otherwise] * (len(charges) - len(terms))
    try:
        return tuple(
            StoredCharge(**asdict(charge), **asdict(noted))
            for charge, noted in zip(charges, terms, strict=True)
        )
    except ValidationError as error:
        raise _unreadable(error) from None


def terms_in(state: RecordDict) -> list[ChargeTerms]:
    """Returns the terms stored in a state, in the order of its charges; there may be fewer.

    Raises:
        PrivacyError: the terms cannot be read.
    """
    record = state.get(_RECORD)
    if not isinstance(record, ConfigRecord):
        return []
    try:
        noted = json.loads(str(record[_TERMS]))
        return [
            ChargeTerms(float(delta), str(data), *map(str, more)) for delta, data, *more in noted
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise _unreadable(error) from None


def put_terms(state: RecordDict, terms: Sequence[ChargeTerms]) -> None:
    """Stores the terms of each charge in a state."""
    noted = [[one.target_delta, one.data, *([one.id] if one.id else [])] for one in terms]
    state[_RECORD] = ConfigRecord({_TERMS: json.dumps(noted)})


def new_terms(target_delta: float, data: str) -> ChargeTerms:
    """Returns the terms of a new charge, with a random id."""
    return ChargeTerms(target_delta, data, secrets.token_hex(8))


def count(runs: Runs) -> int:
    """Returns the number of charges over all runs."""
    return sum(map(len, runs.values()))


def mark_of(runs: Runs) -> LedgerMark:
    """Returns the mark of a ledger: the number of charges, and the id of each run's latest."""
    latest = {run: spent[-1].id for run, spent in runs.items() if spent and spent[-1].id}
    return LedgerMark(charges=count(runs), latest=latest)


def merged(
    copied: Runs, states: Mapping[str, tuple[Sequence[StoredCharge], int]], where: Path
) -> dict[str, tuple[StoredCharge, ...]]:
    """Merges the charges in ``ledger.json`` and in states; for each run the longer list wins.

    Args:
        copied: The charges in ``ledger.json``, by run.
        states: The charges in each run's state, and how many of them have stored terms.
        where: The device's folder, for errors.

    Raises:
        PrivacyError: a charge differs between the two.
    """
    book = dict(copied)
    for run, (spent, noted) in states.items():
        _check_copy(where, run, book.get(run, ()), spent, noted)
        book[run] = max(book.get(run, ()), spent, key=len)
    return {run: tuple(spent) for run, spent in book.items() if spent}


def _check_copy(
    where: Path, run: str, copied: Sequence[StoredCharge], spent: Sequence[StoredCharge], noted: int
) -> None:
    for place, (one, other) in enumerate(zip(copied, spent, strict=False)):
        if one.charge != other.charge or (place < noted and one != other):
            raise PrivacyError(
                f"{where}: charge {place + 1} of run {run!r} differs between {LEDGER} and the "
                "run's state: one of the two is damaged. The epsilon spent is unknown, so "
                "nothing was trained; remove the damaged file, and the next start restores it "
                "from the other."
            )


def check_marks(where: Path, runs: Runs, marks: Mapping[Path, LedgerMark | None]) -> None:
    """Checks a ledger against its marks; see `against_marks`.

    Raises:
        PrivacyError: charges are missing, or another copy of this device has made one.
    """
    for problem in against_marks(where, runs, marks):
        raise problem


def against_marks(
    where: Path, runs: Runs, marks: Mapping[Path, LedgerMark | None]
) -> Iterator[PrivacyError]:
    """Yields an error for each contradiction between a ledger and its marks.

    A ledger must have at least as many charges as a mark counts, and contain the latest charge of
    each run in the mark.

    Args:
        where: The device's folder, for errors.
        runs: All charges, by run.
        marks: The marks by path; None for a missing file, which is not an error.
    """
    found, more, strange = count(runs), dict[Path, int](), dict[str, list[Path]]()
    for path, mark in marks.items():
        if mark is not None and found < mark.charges:
            more[path] = mark.charges
        elif mark is not None and (run := _missing_charge(runs, mark)):
            strange.setdefault(run, []).append(path)
    if more:
        said = " and ".join(f"{path} says that {made} were made" for path, made in more.items())
        yield PrivacyError(
            f"{where}: this device's ledger holds {counted(found, 'charge')}, but {said}: the "
            "ledger was removed, replaced by an earlier copy, or is another device's. The "
            "epsilon spent is unknown, so nothing was trained; restore the latest folder, or "
            "pass this device's own with --state. Only if that is lost for good, lower "
            "max_epsilon in the owner's file by the most that can have been spent, and remove "
            f"{_names(more)}."
        )
    for run, paths in strange.items():
        said = " and ".join(f"{path} says" for path in paths)
        yield PrivacyError(
            f"{where}: this device's ledger does not contain the charge of run {run!r} that "
            f"{said} was made last: a second copy of this device has trained meanwhile, or the "
            "folder is another device's. The epsilon spent is unknown, so nothing was trained; "
            "continue with that copy only, or pass this device's own folder with --state. Only "
            "if that is lost for good, lower max_epsilon in the owner's file by the most that it "
            f"can have spent, and remove {_names(paths)}."
        )


def _names(paths: Iterable[Path]) -> str:
    return " and ".join(path.name for path in paths)


def _missing_charge(runs: Runs, mark: LedgerMark) -> str:
    """Returns a run whose latest charge in ``mark`` is not in ``runs``; empty if there is none."""
    for run, latest in mark.latest.items():
        if latest not in {one.id for one in runs.get(run, ())}:
            return run
    return ""


def states_of(
    names: Sequence[str], state: Callable[[str], RecordDict], otherwise: ChargeTerms
) -> dict[str, tuple[tuple[StoredCharge, ...], int]]:
    """Reads the charges in each run's state, and how many of them have stored terms.

    Args:
        names: Names of the runs.
        state: Returns the state of a run.
        otherwise: Terms of charges without stored ones.

    Raises:
        PrivacyError: the charges of a state cannot be read.
    """
    held = ((name, state(name)) for name in names)
    return {name: (spent_in(one, otherwise), len(terms_in(one))) for name, one in held}


def _unreadable(error: Exception) -> PrivacyError:
    return PrivacyError(
        f"ledger: cannot read the charges in a run's state ({error}). The epsilon spent is "
        "unknown, so nothing was trained; remove the state, and the next start restores it from "
        f"{LEDGER}."
    )


def _read(path: Path, kind: type[_File], max_bytes: int) -> _File | None:
    try:
        raw = read_if_exists(path, max_bytes=max_bytes, what="the ledger")
        return None if raw is None else kind.model_validate_json(raw)
    except DataError as error:
        reason = str(error)
    except ValidationError as error:
        reason = f"{path}: {first_fault(error)}."
    raise PrivacyError(
        f"{reason} It may not show what was spent, so nothing was trained; restore it from a "
        "backup, or remove it: the next start restores it from the files beside it."
    )
