"""What a device has spent over all runs: a server that names its run anew gets no new budget.

The state of a run holds its charges and becomes durable together with the reply that they pay for.
``ledger.json`` beside the states is a copy of all of them, and ``ledger.mark`` in the folder of the
kit says how many there are. A state that was removed, or put back as it was before, is mended from
the copy; where both are gone, the mark shows it, and nothing is trained.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from flwr.app import ConfigRecord, RecordDict
from pydantic import Field, ValidationError

from edge_client.node.state import DeviceFolder
from fedcore.config import Fraction, Positive, Section
from fedcore.errors import DataError, PrivacyError
from fedcore.files import read_bytes, write_atomic
from fedcore.privacy.accounting import Charge
from fedcore.privacy.ledger import Ledger, OtherRuns, ledger_in, put_ledger

LEDGER, MARK = "ledger.json", "ledger.mark"
_MAX_LEDGER_BYTES = 64 << 20
_MAX_MARK_BYTES = 1 << 10
_RECORD, _TERMS = "fedcore.charged", "terms"
_File = TypeVar("_File", bound=Section)


class _Spent(Section):
    """One charge, and what it was made on."""

    round: int
    noise_multiplier: Positive
    sample_rate: Annotated[float, Field(gt=0, le=1)]
    steps: Annotated[int, Field(ge=0)]
    target_delta: Fraction
    """What its run counted it at."""
    data: str
    """The folder of the data; empty where the task itself knows where they are."""

    @property
    def charge(self) -> Charge:
        return Charge(self.round, self.noise_multiplier, self.sample_rate, self.steps)


class _Book(Section):
    """``ledger.json``."""

    format: Literal["fedcore.ledger/1"] = "fedcore.ledger/1"
    runs: dict[str, tuple[_Spent, ...]]


class _Mark(Section):
    """``ledger.mark``."""

    format: Literal["fedcore.mark/1"] = "fedcore.mark/1"
    charges: Annotated[int, Field(ge=0)]


@dataclass(frozen=True)
class DeviceLedger:
    """What one run spends on a device, among all the others."""

    folder: DeviceFolder
    mark: Path
    """A file that does not lie in ``folder``, so that the two are not lost or put back together."""
    run: str
    data: Path | None
    """The folder of the data; None where the task itself knows where they are."""
    target_delta: float
    """What this run counts its charges at."""

    def open(self, state: RecordDict) -> OtherRuns:
        """What other runs have spent on the same data; mends ``state``, this run's, and the copies.

        Two folders of which one lies in the other count as the same data, and so does whatever a
        task finds by itself.

        Raises:
            PrivacyError: what was spent cannot be read, charges are missing, or copies differ.
            DataError: the state of a run cannot be read.
            ResourceError: the ledger or the mark may not be written.
        """
        copied = _read(self.folder.path / LEDGER, _Book, _MAX_LEDGER_BYTES)
        book = dict(copied.runs) if copied is not None else {}
        for name in self.folder.runs():
            held = state if name == self.run else self.folder.state(name)
            spent = self._spent(held)
            self._check_copy(name, book.get(name, ()), spent, len(_terms(held)))
            book[name] = max(book.get(name, ()), spent, key=len)
        self._check_mark(_count(book))
        own = book.get(self.run, ())
        if len(own) > len(ledger_in(state).charges):
            put_ledger(state, Ledger(tuple(one.charge for one in own)))
            _put_terms(state, [(one.target_delta, one.data) for one in own])
        if copied is None or copied.runs != book or self._marked() < _count(book):
            self._write(book)
        here = [
            (name, one)
            for name, spent in book.items()
            for one in spent
            if _overlap(one.data, self._data)
        ]
        return OtherRuns(
            tuple(one.charge for name, one in here if name != self.run),
            min((one.target_delta for _, one in here), default=1.0),
        )

    def label(self, state: RecordDict) -> bool:
        """Notes on what terms the latest charges were made; says whether there are any."""
        terms = [(one.target_delta, one.data) for one in self._spent(state)]
        grown = len(terms) > len(_terms(state))
        if grown:
            _put_terms(state, terms)
        return grown

    def copy(self, state: RecordDict) -> None:
        """Copies the run's charges, which are on disk by now: before anything leaves.

        Raises:
            PrivacyError: the ledger has become unreadable meanwhile.
            DiskFull: there is no room.
        """
        copied = _read(self.folder.path / LEDGER, _Book, _MAX_LEDGER_BYTES)
        if copied is None or _count(copied.runs) < self._marked():
            self.open(state)  # somebody was at it meanwhile
        else:
            self._write({**copied.runs, self.run: self._spent(state)})

    @property
    def _data(self) -> str:
        return "" if self.data is None else str(self.data.resolve())

    def _spent(self, state: RecordDict) -> tuple[_Spent, ...]:
        """The charges in a state; those without terms were made on those of now."""
        charges = ledger_in(state).charges
        terms = _terms(state)[: len(charges)]
        terms += [(self.target_delta, self._data)] * (len(charges) - len(terms))
        try:
            return tuple(
                _Spent(**asdict(charge), target_delta=delta, data=data)
                for charge, (delta, data) in zip(charges, terms, strict=True)
            )
        except ValidationError as error:
            raise _unreadable(error) from None

    def _marked(self) -> int:
        """How many charges were made, as far as the mark knows."""
        mark = _read(self.mark, _Mark, _MAX_MARK_BYTES)
        return mark.charges if mark is not None else 0

    def _check_copy(
        self, run: str, copied: Sequence[_Spent], spent: Sequence[_Spent], with_terms: int
    ) -> None:
        """Refuses a state and a copy that tell of the same charges differently."""
        for place, (one, other) in enumerate(zip(copied, spent, strict=False)):
            if one.charge != other.charge or (place < with_terms and one != other):
                raise PrivacyError(
                    f"{self.folder.path}: charge {place + 1} of run {run!r} is one thing in "
                    f"{LEDGER} and another in the run's state: one of the two is damaged. What "
                    "was spent is unknown, so nothing was trained; remove the file that was "
                    "changed, and it is mended from the other."
                )

    def _check_mark(self, found: int) -> None:
        marked = self._marked()
        if found < marked:
            raise PrivacyError(
                f"{self.folder.path}: this device's ledger holds {found} charges, and "
                f"{self.mark} says that {marked} were made: it was removed, or put back as "
                "it was before. What was spent is unknown, so nothing was trained; put the latest "
                "folder back, or, where it is lost, lower max_epsilon in owner.toml by what was "
                f"spent at most and remove {self.mark.name}."
            )

    def _write(self, book: dict[str, tuple[_Spent, ...]]) -> None:
        raw = _Book(runs=book).model_dump_json().encode() + b"\n"
        write_atomic(self.folder.path / LEDGER, raw, mode=0o600)
        mark = _Mark(charges=_count(book))
        write_atomic(self.mark, mark.model_dump_json().encode() + b"\n", mode=0o600)


def _count(book: Mapping[str, Sequence[_Spent]]) -> int:
    return sum(map(len, book.values()))


def _overlap(one: str, other: str) -> bool:
    """Whether two folders of data may hold the same examples."""
    if not one or not other:
        return True
    first, second = Path(one), Path(other)
    return first.is_relative_to(second) or second.is_relative_to(first)


def _terms(state: RecordDict) -> list[tuple[float, str]]:
    """Delta and data of each charge in a state, as far as they are noted."""
    record = state.get(_RECORD)
    if not isinstance(record, ConfigRecord):
        return []
    try:
        return [(float(delta), str(data)) for delta, data in json.loads(str(record[_TERMS]))]
    except (KeyError, TypeError, ValueError) as error:
        raise _unreadable(error) from None


def _unreadable(error: Exception) -> PrivacyError:
    return PrivacyError(
        f"ledger: what a run's state tells of its charges cannot be read ({error}). What was spent "
        f"is unknown, so nothing was trained; remove the state: it is mended from {LEDGER}."
    )


def _put_terms(state: RecordDict, terms: list[tuple[float, str]]) -> None:
    state[_RECORD] = ConfigRecord({_TERMS: json.dumps(terms)})


def _read(path: Path, kind: type[_File], max_bytes: int) -> _File | None:
    if not path.exists():
        return None
    try:
        return kind.model_validate_json(read_bytes(path, max_bytes=max_bytes, what="the ledger"))
    except DataError as error:
        reason = str(error)
    except ValidationError as error:
        first = error.errors()[0]
        reason = f"{path}: {'.'.join(map(str, first['loc'])) or 'document'}: {first['msg']}."
    raise PrivacyError(
        f"{reason} It may not tell what was spent, so nothing was trained; put it back from a "
        "backup, or remove it: it is written anew from what lies beside it."
    )
