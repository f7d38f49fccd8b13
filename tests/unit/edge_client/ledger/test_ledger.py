"""What a device has spent, whatever a server calls its runs and whatever becomes of its files."""

from __future__ import annotations

import itertools
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest
from flwr.app import ConfigRecord, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_client.device_folder import DeviceFolder, lock_device_folder
from edge_client.ledger.book import COUNT, LEDGER, MARK
from edge_client.ledger.ledger import DeviceLedger
from fedcore.config.owner import OwnerPolicy
from fedcore.config.run import Privacy, RunConfig
from fedcore.errors import BudgetExhausted, DataError, PrivacyError
from fedcore.files import write_atomic
from fedcore.privacy.accounting import Charge
from fedcore.privacy.ledger import Ledger, OtherRuns, charge, ledger_in, put_ledger

DATA = Path("/srv/measurements")


class Machine:
    """A device that forgets everything but its files between two rounds."""

    def __init__(self, kit: Path, folder: DeviceFolder, owner: OwnerPolicy | None = None) -> None:
        self.kit, self.folder, self.owner = kit, folder, owner or OwnerPolicy()
        self.counted = kit.parent / "counts" / COUNT
        self._keys = itertools.count()

    def ledger(self, run: str, data: Path | None = DATA, delta: float = 1e-5) -> DeviceLedger:
        privacy = Privacy(unit="example", target_delta=delta, max_epsilon=1e6)
        config = RunConfig(name=run, task="task.py", privacy=privacy)
        return DeviceLedger(self.folder, self.kit / MARK, self.counted, config, self.owner, data)

    def open(self, run: str, data: Path | None = DATA) -> tuple[int, OtherRuns]:
        """How many charges this run has, and what others have spent."""
        state = self.folder.state(run)
        others = self.ledger(run, data).open(state)
        return len(ledger_in(state).charges), replace(others, max_charges=None)

    def train(
        self, run: str, *, data: Path | None = DATA, delta: float = 1e-5, copied: bool = True
    ) -> Charge:
        """A round of ``run``, from opening it to the moment before the reply leaves.

        Without ``copied`` it dies when its state has the charge, and nothing else has."""
        state, ledger = self.folder.state(run), self.ledger(run, data, delta)
        ledger.open(state)
        before = ledger_in(state).charges
        new = Charge(len(before) + 1, 1.1, 1 / 3, 3)
        put_ledger(state, Ledger((*before, new)))
        if not copied:
            died = patch.object(DeviceLedger, "_repair", side_effect=KeyboardInterrupt)
            with died, pytest.raises(KeyboardInterrupt):
                ledger.commit(state)
            return new
        ledger.commit(state)
        self.folder.store_reply(run, state, f"key{next(self._keys)}", RecordDict())
        return new

    @property
    def states(self) -> Path:
        return self.folder.path / "state"


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    (tmp_path / "kit").mkdir()
    with lock_device_folder(tmp_path / "device") as folder:
        yield Machine(tmp_path / "kit", folder)


def test_a_run_with_another_name_gets_no_new_budget(machine: Machine) -> None:
    spent = [machine.train(f"run-{number}") for number in range(3)]
    assert machine.open("run-3") == (0, OtherRuns(tuple(spent), 1e-5))
    assert machine.open("run-1") == (1, OtherRuns((spent[0], spent[2]), 1e-5))


def test_the_budget_of_an_owner_holds_over_runs_at_the_least_delta() -> None:
    privacy = Privacy(unit="example", max_epsilon=100.0, target_delta=1e-4)
    new = Charge(1, 1.1, 1 / 3, 3)
    others = OtherRuns((new, new), 1e-6)
    alone = charge(Ledger(), new, privacy, client="anna", owner=OwnerPolicy(max_epsilon=100.0))
    together = Ledger((new, new, new))
    needed = {
        delta: together.epsilon(privacy.model_copy(update={"target_delta": delta}))
        for delta in (1e-4, 1e-6)
    }
    assert alone.epsilon(privacy) < needed[1e-4] < needed[1e-6]
    for owner, allowed in (
        (OwnerPolicy(max_epsilon=needed[1e-6]), True),
        (OwnerPolicy(max_epsilon=needed[1e-6] * 0.999), False),
        (OwnerPolicy(max_epsilon=needed[1e-4]), False),  # a server cannot choose a larger delta
        (OwnerPolicy(max_epsilon=needed[1e-4], target_delta=1e-4), True),
        (OwnerPolicy(), True),
    ):
        if allowed:
            assert charge(Ledger(), new, privacy, client="anna", owner=owner, others=others)
            continue
        with pytest.raises(BudgetExhausted, match="over all runs, client 'anna' has spent epsilon"):
            charge(Ledger(), new, privacy, client="anna", owner=owner, others=others)


def test_two_runs_at_once_see_what_the_other_has_spent(machine: Machine) -> None:
    spent = [machine.train(run) for run in ("one", "two", "one", "two", "one")]
    assert machine.open("one") == (3, OtherRuns((spent[1], spent[3]), 1e-5))
    assert machine.open("two") == (2, OtherRuns((spent[0], spent[2], spent[4]), 1e-5))


@pytest.mark.parametrize(
    "data", [DATA, DATA / "2026", DATA.parent, Path("/srv/measurements-of-others"), None]
)
def test_other_data_get_no_budget_of_their_own_unless_the_owner_names_them(
    machine: Machine, data: Path | None
) -> None:
    spent = machine.train("one")
    assert machine.open("two", data) == (0, OtherRuns((spent,), 1e-5))


def test_the_least_delta_of_any_run_is_kept(machine: Machine) -> None:
    for number, delta in enumerate((1e-5, 1e-7, 1e-3)):
        machine.train(f"run-{number}", delta=delta)
    assert machine.open("run-0")[1].target_delta == 1e-7
    machine.train("same-name", delta=1e-9)
    machine.train("same-name", delta=1e-2)
    assert machine.open("same-name")[1].target_delta == 1e-9


def test_files_that_are_gone_or_older_are_mended(machine: Machine) -> None:
    machine.train("one")
    older = (machine.states / "one.state").read_bytes()
    first = (machine.folder.path / LEDGER).read_bytes()
    spent = [machine.train("one"), machine.train("two")]
    whole = machine.open("three")[1]
    assert len(whole.charges) == 3

    (machine.folder.path / LEDGER).unlink()
    assert machine.open("three")[1] == whole
    (machine.folder.path / LEDGER).write_bytes(first)
    assert machine.open("three")[1] == whole
    (machine.states / "two.state").unlink()
    assert machine.open("three")[1] == whole
    (machine.states / "one.state").write_bytes(older)
    assert machine.open("one") == (2, OtherRuns((spent[1],), 1e-5))
    (machine.kit / MARK).unlink()
    assert machine.open("three")[1] == whole
    assert machine.train("one").round == 3, "it goes on after what was mended"


def test_a_ledger_that_was_removed_or_put_back_stops_training(machine: Machine) -> None:
    machine.train("one")
    backup = machine.kit.parent / "backup"
    shutil.copytree(machine.folder.path, backup)
    machine.train("one")

    def empty() -> None:
        for path in machine.folder.path.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    for restore in (
        empty,
        lambda: shutil.copytree(backup, machine.folder.path, dirs_exist_ok=True),
    ):
        restore()
        with pytest.raises(
            PrivacyError, match="says that 2 were made: the ledger was removed, replaced"
        ):
            machine.open("one")
        with pytest.raises(PrivacyError, match="nothing was trained; restore the latest"):
            machine.open("another")
    (machine.kit / MARK).unlink()
    with pytest.raises(PrivacyError, match=r"ledger\.count says that 2 were made"):
        machine.open("one")
    machine.counted.unlink()  # the owner has read what both say
    assert machine.open("one")[0] == 1


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b'{"format": "fedcore.ledger/2", "runs": {}}',
        b'{"runs": {"one": [{"round": 1}]}}',
        b'{"runs": {"one": [{"round": 1, "noise_multiplier": -1.0, "sample_rate": 0.1, '
        b'"steps": 1, "target_delta": 1e-5, "data": ""}]}}',
        b"\xff\xfe",
    ],
)
def test_a_torn_ledger_stops_training_until_it_is_removed(machine: Machine, raw: bytes) -> None:
    machine.train("one")
    whole = machine.open("two")[1]
    (machine.folder.path / LEDGER).write_bytes(raw)
    with pytest.raises(PrivacyError, match=r"ledger\.json: .* nothing was trained; restore it"):
        machine.open("two")
    (machine.folder.path / LEDGER).unlink()
    assert machine.open("two")[1] == whole


def test_a_torn_mark_and_a_torn_state_stop_training(machine: Machine) -> None:
    machine.train("one")
    (machine.kit / MARK).write_text("{")
    with pytest.raises(PrivacyError, match=r"ledger\.mark: .* nothing was trained"):
        machine.open("two")
    (machine.kit / MARK).unlink()
    (machine.states / "one.state").write_bytes(b"\xff\xff garbage")
    with pytest.raises(DataError, match="does not contain the record"):
        machine.open("two")


@pytest.mark.parametrize("where", [LEDGER, MARK])
@pytest.mark.parametrize("what", ["folder", "pipe", "loop"])
def test_something_else_in_a_ledgers_place_stops_training(
    machine: Machine, where: str, what: str
) -> None:
    machine.train("one")
    whole = machine.open("two")[1]
    path = (machine.kit if where == MARK else machine.folder.path) / where
    path.unlink()
    {"folder": path.mkdir, "pipe": lambda: os.mkfifo(path)}.get(
        what, lambda: path.symlink_to(path.name)
    )()
    why = "Too many levels of symbolic links" if what == "loop" else "another kind of file"
    with pytest.raises(PrivacyError, match=f"{why}.* or remove it"):
        machine.open("two")
    path.rmdir() if what == "folder" else path.unlink()
    assert machine.open("two")[1] == whole
    assert path.is_file()


def test_a_mark_that_is_gone_or_behind_is_written_again(machine: Machine) -> None:
    machine.train("one")
    machine.train("one")
    for path in (machine.kit / MARK, machine.counted):
        raw = path.read_bytes()
        older = b'{"format":"fedcore.mark/1","charges":0}'
        for damage in (b"", older):
            path.write_bytes(damage) if damage else path.unlink()
            machine.open("one")
            assert path.read_bytes() == raw
            assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("where", ["ledger", "mark", "state"])
def test_a_flipped_bit_never_hides_what_was_spent(machine: Machine, where: str) -> None:
    machine.train("one")
    machine.train("one", delta=1e-6)
    path = {
        "ledger": machine.folder.path / LEDGER,
        "mark": machine.kit / MARK,
        "state": machine.states / "one.state",
    }[where]
    files = [machine.folder.path / LEDGER, machine.kit / MARK, machine.states / "one.state"]
    whole = {file: file.read_bytes() for file in files}
    truth = machine.open("two")[1]
    state = machine.folder.state("one")
    machine.ledger("one").open(state)
    lock_device_folder = ledger_in(state)
    refused = 0
    for place in range(len(whole[path])):
        raw = bytearray(whole[path])
        raw[place] ^= 1 << place % 7
        path.write_bytes(raw)
        try:
            others = machine.open("two")[1]
            state = machine.folder.state("one")
            machine.ledger("one").open(state)
        except (PrivacyError, DataError):
            refused += 1
        else:
            assert others.target_delta <= truth.target_delta
            assert set(truth.charges) <= set(others.charges)
            assert ledger_in(state) == lock_device_folder
        for file, held in whole.items():
            file.write_bytes(held)
        for new in (*machine.states.iterdir(), *machine.folder.path.glob("*.json")):
            assert new in files or new.unlink() is None
    assert refused > len(whole[path]) / 4


def test_dying_before_the_copy_costs_nothing_and_hides_nothing(machine: Machine) -> None:
    spent = [machine.train("one"), machine.train("one", copied=False)]
    assert machine.open("two") == (0, OtherRuns(tuple(spent), 1e-5))
    assert machine.open("one") == (2, OtherRuns((), 1e-5))
    shutil.rmtree(machine.states)  # what was open has copied it meanwhile
    assert machine.open("one")[0] == 2


@pytest.mark.parametrize("what", ["removed", "earlier copy"])
def test_a_ledger_that_is_touched_after_it_was_read_is_mended_before_a_round_begins(
    machine: Machine, what: str
) -> None:
    machine.train("one")
    first = (machine.folder.path / LEDGER).read_bytes()
    machine.train("one")
    machine.train("two")
    state, ledger = machine.folder.state("two"), machine.ledger("two")
    ledger.open(state)
    put_ledger(state, Ledger((*ledger_in(state).charges, Charge(2, 1.1, 1 / 3, 3))))
    if what == "removed":
        (machine.folder.path / LEDGER).unlink()
    else:
        (machine.folder.path / LEDGER).write_bytes(first)
    ledger.commit(state)
    (machine.states / "two.state").unlink()
    assert len(machine.open("three")[1].charges) == 4
    assert json.loads((machine.kit / MARK).read_text())["charges"] == 4


def test_charges_of_before_there_were_terms_count_on_all_terms_of_now(machine: Machine) -> None:
    state = RecordDict()
    put_ledger(state, Ledger((Charge(1, 1.0, 0.5, 2),)))
    machine.folder.keep_state("old", state)
    assert machine.open("new")[1] == OtherRuns((Charge(1, 1.0, 0.5, 2),), 1e-5)
    assert isinstance(state["fedcore.ledger"], ConfigRecord)


@settings(max_examples=25)
@given(
    deaths=st.lists(
        st.tuples(st.sampled_from(["one", "two"]), st.integers(0, 6)), min_size=1, max_size=12
    )
)
def test_whatever_dies_and_when_what_may_have_begun_is_charged_once(
    tmp_path_factory: pytest.TempPathFactory, deaths: list[tuple[str, int]]
) -> None:
    """Dying at each of the writes of a round, in turn, in runs that take turns."""
    root = tmp_path_factory.mktemp("device")
    (root / "kit").mkdir()
    begun = {"one": 0, "two": 0}
    for run, lives in deaths:
        with lock_device_folder(root / "device") as folder, pytest.MonkeyPatch.context() as patch:
            machine = Machine(root / "kit", folder)
            state = folder.state(run)
            machine.ledger(run).open(state)
            put_ledger(state, Ledger((*ledger_in(state).charges, Charge(1, 1.0, 0.5, 2))))
            left = itertools.count(lives, -1)

            def dying(path: Path, data: bytes, *, mode: int) -> None:
                if next(left) == 0:  # noqa: B023
                    raise KeyboardInterrupt
                write_atomic(path, data, mode=mode)

            patch.setattr("edge_client.ledger.ledger.write_atomic", dying)
            patch.setattr("edge_client.device_folder.write_atomic", dying)
            try:
                ledger = machine.ledger(run)
                ledger.commit(state)
                folder.store_reply(run, state, "key", RecordDict())
            except KeyboardInterrupt:
                pass
            begun[run] += lives >= 1  # the state is there; what is trained comes after
    with lock_device_folder(root / "device") as folder:
        machine = Machine(root / "kit", folder)
        found = {run: machine.open(run) for run in begun}
    assert {run: count for run, (count, _) in found.items()} == begun
    assert len(found["one"][1].charges) == begun["two"]


@pytest.mark.parametrize("harm", ["gone", "empty"])
def test_a_state_that_lacks_charges_is_mended_and_told_of(
    machine: Machine, harm: str, caplog: pytest.LogCaptureFixture
) -> None:
    machine.train("one")
    machine.train("one")
    path = machine.states / "one.state"
    path.write_bytes(b"") if harm == "empty" else path.unlink()
    caplog.clear()
    machine.open("one")
    assert any("the state of run 'one' lacks 2 charges" in line for line in caplog.messages)
