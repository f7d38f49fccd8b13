"""A server that opens ever new runs on a device, or goes on with one forever."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.proto.message_pb2 import ObjectTree

import edge_client.ledger.ledger as ledger_module
from edge_client import device_folder as state_module
from edge_client.agent import loop
from edge_client.agent.run import DeviceSetup
from edge_client.agent.wake import Signals, TokenBucket
from edge_client.device_folder import DeviceFolder, lock_device_folder
from edge_client.ledger import book as ledger_book
from edge_client.ledger.book import (
    MAX_CHARGES,
    MAX_RUNS,
    ChargeTerms,
    LedgerFile,
    StoredCharge,
    count,
    mark_of,
    put_terms,
    read_book,
    read_mark,
)
from edge_client.ledger.export import MAX_EXPORT_BYTES, Exported, _Composed
from edge_client.ledger.ledger import IDLE_RUNS, drop_idle
from fedcore.config.owner import OPEN_POLICY
from fedcore.config.run import RunConfig
from fedcore.errors import PrivacyError
from fedcore.flower.fleet_pull import AnnouncedMessage
from fedcore.flower.identity import assume_identity
from fedcore.flower.records import record_bytes
from fedcore.privacy.accounting import MAX_KEPT, Charge
from fedcore.privacy.ledger import Ledger, ledger_in, put_ledger
from fedcore.task.definition import Task
from fedcore.updates.messages import (
    MAX_ROUNDS,
    REFUSED,
)
from tests.unit.edge_client.agent.asked import PRIVATE, RUN_ID, Link, instruction, kit_in, run_of
from tests.unit.fedcore.clients import make_task

HIDDEN = "client 'anna': LedgerFull; the client's log has the details"


@dataclass
class Site:
    """A device, and a server that asks it for whatever it likes."""

    folder: DeviceFolder
    device: DeviceSetup
    task: Task = field(default_factory=make_task)

    def ask(self, name: str, *, private: bool, number: int = 1) -> Message:
        """The device's answer to an instruction of the run of that name."""
        run = run_of(name, privacy=PRIVATE if private else {})
        link = Link(run)
        found = AnnouncedMessage(instruction(self.task, run, number), ObjectTree())
        loop._answer_or_reject(self.device, cast(Any, link), Signals(), {}, found)
        return link.answers[-1]

    def charges(self) -> dict[str, int]:
        book = read_book(self.folder.path)
        return {run: len(spent) for run, spent in book.runs.items()} if book else {}

    def files(self) -> dict[Path, bytes]:
        root = self.folder.path.parent
        return {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    assume_identity(RUN_ID)
    with lock_device_folder(tmp_path / "device") as folder:
        task = make_task()
        device = DeviceSetup(kit_in(tmp_path), task, tmp_path / "task.py", OPEN_POLICY, folder)
        yield Site(folder, device, task)


def test_ever_new_runs_are_refused_before_anything_is_charged_or_written(
    site: Site, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(ledger_module, "MAX_RUNS", 3)
    for number in range(3):
        assert not site.ask(f"run-{number}", private=True).has_error()
    before = site.files()
    for number in range(3, 6):
        reply = site.ask(f"run-{number}", private=True)
        assert reply.error.code == REFUSED + PrivacyError.exit_code
        assert reply.error.reason == HIDDEN
    assert site.files() == before
    assert (
        "run 'run-5' is new, but this device's ledger already contains 3 runs, the limit is 3"
        in caplog.text
    )
    assert "pass an empty one with --state" in caplog.text
    assert not site.ask("run-1", private=True, number=2).has_error(), "a known run goes on"
    assert site.charges() == {"run-0": 1, "run-1": 2, "run-2": 1}


def test_a_server_cannot_fill_a_ledger_with_runs_as_fast_as_it_can_ask(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    now = [0.0]
    site.device = replace(site.device, new_runs=TokenBucket(900.0, 2, clock=lambda: now[0]))
    assert not site.ask("one", private=True).has_error()
    assert not site.ask("two", private=True).has_error()
    before = site.files()
    reply = site.ask("three", private=True)
    assert reply.error.code == REFUSED + PrivacyError.exit_code
    assert site.files() == before
    assert "run 'three' is new, but this server has already started 64" in caplog.text
    assert not site.ask("one", private=True, number=2).has_error(), "a known run goes on"
    assert not site.ask("plain", private=False).has_error(), "nothing is charged in it"
    now[0] += 901.0
    assert not site.ask("three", private=True).has_error()
    assert site.ask("four", private=True).has_error()
    assert site.charges() == {"one": 2, "two": 1, "three": 1}


def test_a_run_without_an_end_is_refused_before_anything_is_charged_or_written(
    site: Site, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(ledger_module, "MAX_CHARGES", 3)
    for number in (1, 2):
        assert not site.ask("one", private=True, number=number).has_error()
    assert not site.ask("two", private=True).has_error()
    for run in ("one", "new"):
        before = site.files()
        assert site.ask(run, private=True, number=3).error.reason == HIDDEN
        assert site.files() == before
        assert site.charges() == {"one": 2, "two": 1}
    assert "has 2 charges of this run in its ledger, the limit is 2" in caplog.text
    assert "has 0 charges of this run in its ledger, the limit is 0" in caplog.text
    assert "new" not in site.folder.runs()


def test_a_private_run_that_fails_before_its_charge_leaves_no_file(site: Site) -> None:
    assert site.ask("run", private=True, number=MAX_ROUNDS + 1).has_error()
    assert site.folder.runs() == []


def test_of_runs_without_charges_the_latest_are_kept(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger_module, "IDLE_RUNS", 3)
    charged = [f"charged-{number}" for number in range(5)]
    for run in charged:
        assert not site.ask(run, private=True).has_error()
    for number in range(9):
        assert not site.ask(f"plain-{number}", private=False).has_error()
        assert len(site.folder.runs()) <= len(charged) + 4
    assert site.folder.runs() == [*charged, *(f"plain-{number}" for number in (5, 6, 7, 8))]
    assert site.charges() == dict.fromkeys(charged, 1)


@pytest.mark.parametrize("ledger", ["lost", "torn"])
def test_no_state_with_a_charge_is_dropped_though_the_ledger_does_not_tell_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ledger: str
) -> None:
    monkeypatch.setattr(ledger_module, "IDLE_RUNS", 2)
    with lock_device_folder(tmp_path) as folder:
        if ledger == "torn":
            (folder.path / "ledger.json").write_text("{")
        charged, odd = RecordDict(), folder.path / "state" / "odd.state"
        put_ledger(charged, Ledger((Charge(1, 1.0, 0.5, 2),)))
        folder.keep_state("charged", charged)
        odd.write_bytes(b"\xff\xff no record")
        for number in range(4):
            folder.keep_state(f"plain-{number}", RecordDict())
        drop_idle(folder, before="plain-0")
        assert len(folder.runs()) == 6, "a run that is known takes no more room"
        drop_idle(folder, before="plain-4")
        assert folder.runs() == ["charged", "odd", "plain-2", "plain-3"]


def test_local_layers_of_the_latest_runs_alone_are_kept(tmp_path: Path) -> None:
    with lock_device_folder(tmp_path) as folder:
        for number in range(20):
            state = RecordDict({"fedcore.local": ConfigRecord({"state": bytes(100_000)})})
            put_ledger(state, Ledger((Charge(number, 1.0, 0.5, 2),)))
            folder.keep_state(f"run-{number}", state)
            os.utime(folder.path / "state" / f"run-{number}.state", (number, number))
        folder.drop_local(before="run-3")
        assert all("fedcore.local" in folder.state(run) for run in folder.runs())
        before = folder.runs_by_age()
        for _ in range(2):
            folder.drop_local(before="another")
        kept = [run for run in folder.runs_by_age() if "fedcore.local" in folder.state(run)]
        assert kept == [f"run-{number}" for number in range(5, 20)]
        assert folder.runs_by_age() == before
        assert ledger_in(folder.state("run-0")).charges == (Charge(0, 1.0, 0.5, 2),)


def test_states_of_runs_without_charges_take_little_room() -> None:
    assert IDLE_RUNS * 4096 <= 2 << 20


def test_the_longest_ledger_that_may_be_can_be_read(tmp_path: Path) -> None:
    """The longest names, labels and numbers, as many as there may be of each."""
    number = 1.2345678901234567e-300  # no positive float has more characters
    names = [f"{place:0>64}" for place in range(MAX_RUNS)]
    RunConfig(name=names[0], task="task.py")
    with pytest.raises(ValueError, match="name"):
        RunConfig(name=names[0] + "0", task="task.py")
    label = f"{'d' * 64}:{'9' * 9}:{'f' * 64}"
    one = StoredCharge(
        round=MAX_ROUNDS,
        noise_multiplier=number,
        sample_rate=number,
        steps=2**63,
        target_delta=number,
        data=label,
        id="f" * 32,
    )
    runs = dict.fromkeys(names, (one,) * (MAX_CHARGES // MAX_RUNS))
    assert count(runs) == MAX_CHARGES

    book = LedgerFile(runs=runs).model_dump_json().encode() + b"\n"
    assert 2 * len(book) < ledger_book._MAX_LEDGER_BYTES
    (tmp_path / "ledger.json").write_bytes(book)
    read = read_book(tmp_path)
    assert read is not None
    assert read.runs == runs

    mark = mark_of(runs).model_dump_json().encode() + b"\n"
    assert 2 * len(mark) < ledger_book._MAX_MARK_BYTES
    (tmp_path / "ledger.mark").write_bytes(mark)
    assert read_mark(tmp_path / "ledger.mark") == mark_of(runs)

    state = RecordDict()
    put_ledger(state, Ledger((one.charge,) * MAX_CHARGES))  # all of them in one run
    put_terms(state, [ChargeTerms(one.target_delta, label, one.id)] * MAX_CHARGES)
    state["fedcore.answered"] = ConfigRecord({"keys": ["f" * 64] * 4, "sha256": ["f" * 64] * 4})
    assert 2 * len(record_bytes(state)) < state_module._MAX_STATE_BYTES

    composed = _Composed(target_delta=one.target_delta, epsilon=number)
    exported = Exported(
        made_at="2026-01-01T00:00:00+00:00",
        accountant="rdp",
        runs=runs,
        composed=dict.fromkeys(runs, composed),
        device=composed,
        max_epsilon=number,
        problems=(),
    )
    assert 2 * len(exported.model_dump_json(indent=1)) < MAX_EXPORT_BYTES


def test_what_each_charge_costs_is_kept_for_as_many_as_there_may_be() -> None:
    """Or a server that changes its settings each round would have all of it counted anew."""
    assert MAX_KEPT >= MAX_CHARGES
