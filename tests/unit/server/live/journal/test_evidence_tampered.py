"""How a journal that was tampered with is found out."""

from __future__ import annotations

import math
import os
import sqlite3
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from flwr.app import ConfigRecord, MetricRecord, RecordDict

from fedcore.errors import DataError, SignatureInvalid
from fedcore.updates.messages import ARRAYS, CONFIG, ENVELOPE, METRICS, weights_record
from fedcore.updates.seal import sign_reply
from server.live.journal.entries import Entries, JournalEntry, new_entry
from server.live.journal.evidence import require_sound
from server.live.journal.head import (
    COMMIT,
    JOURNAL,
    PURPOSES,
    RECORD,
    REPLY,
    SIGNATURES,
    copied_entries,
)
from server.live.journal.journal import VALUES
from tests.unit.server.live.journal.journals import (
    LARGE,
    opened,
    vector,
)
from tests.unit.server.live.journal.signed_runs import (
    MEMBERS,
    NOW,
    Edit,
    a_run,
    key,
    keys,
    node,
    rewrite,
    verified,
)


def drops(entries: Entries, found: dict[tuple[str, int, int], JournalEntry]) -> None:
    entries.remove([key("edge-1", 1)])


def drops_of_a_reply(entries: Entries, found: dict[tuple[str, int, int], JournalEntry]) -> None:
    entries.remove([key("edge-1", 3)])


def flips_a_bit(entries: Entries, found: dict[tuple[str, int, int], JournalEntry]) -> None:
    old = found[key("edge-1", 1)]
    rewrite(entries, old, data=bytes((*old.data[:60], old.data[60] ^ 1, *old.data[61:])))


def swaps(entries: Entries, found: dict[tuple[str, int, int], JournalEntry]) -> None:
    one, other = found[key("edge-0", 1)], found[key("edge-1", 1)]
    rewrite(entries, one, doc=other.doc, data=other.data)
    rewrite(entries, other, doc=one.doc, data=one.data)


def swaps_bytes_alone(entries: Entries, found: dict[tuple[str, int, int], JournalEntry]) -> None:
    one, other = found[key("edge-0", 1)], found[key("edge-1", 1)]
    rewrite(entries, one, data=other.data)


def moves_to_another_round(
    entries: Entries, found: dict[tuple[str, int, int], JournalEntry]
) -> None:
    rewrite(entries, found[key("edge-1", 2)], data=found[key("edge-1", 1)].data)


def changes_the_reply(entries: Entries, found: dict[tuple[str, int, int], JournalEntry]) -> None:
    old, other = found[key("edge-1", 3, "reply/")], found[key("edge-0", 3, "reply/")]
    raw = bytes((*other.data[:-1], other.data[-1] ^ 1))
    rewrite(entries, old, data=raw)


def adds(entries: Entries, found: dict[tuple[str, int, int], JournalEntry]) -> None:
    rewrite(entries, found[key("edge-1", 1)], node=7)


def damages(entries: Entries, found: dict[tuple[str, int, int], JournalEntry]) -> None:
    entries.write([replace(found[key("edge-1", 1)], sha256="0" * 64)])


def erases_a_round(entries: Entries, found: dict[tuple[str, int, int], JournalEntry]) -> None:
    entries.write(drop=[(kind, 1, 1) for kind in (RECORD, *SIGNATURES)])


def erases_a_record(entries: Entries, found: dict[tuple[str, int, int], JournalEntry]) -> None:
    entries.remove([(RECORD, 2, 0)])


def damages_a_record(entries: Entries, found: dict[tuple[str, int, int], JournalEntry]) -> None:
    """It counts one update less, and one signature is gone."""
    old = found[(RECORD, 1, 0)]
    entries.write([replace(old, doc=old.doc.replace('"updates": 3', '"updates": 2'))])
    entries.remove([key("edge-1", 1)])


def adds_a_record(entries: Entries, found: dict[tuple[str, int, int], JournalEntry]) -> None:
    values = found[(RECORD, 2, 0)].values
    entries.write([new_entry(RECORD, 4, 0, values | {"round": 4, "updates": 0})])


def erases_a_reply(entries: Entries, found: dict[tuple[str, int, int], JournalEntry]) -> None:
    entries.remove([key("edge-1", 3, "reply/")])


def hides_when(entries: Entries, found: dict[tuple[str, int, int], JournalEntry]) -> None:
    old = found[key("edge-1", 1)]
    values = old.values | {"verified_at_s": math.nan}
    entries.write([new_entry(old.kind, old.round, old.node, values, old.data)])


def moves_when(entries: Entries, found: dict[tuple[str, int, int], JournalEntry]) -> None:
    old = found[key("edge-1", 1)]
    values = old.values | {"verified_at_s": NOW.timestamp() - 30 * 86_400}
    entries.write([new_entry(old.kind, old.round, old.node, values, old.data)])


def takes_one_of_another_past(
    entries: Entries, found: dict[tuple[str, int, int], JournalEntry]
) -> None:
    """It was signed for the same round, before a rollback to another model."""
    content = RecordDict({METRICS: MetricRecord({"num-examples": 7})})
    other = RecordDict(
        {ARRAYS: weights_record(vector(0.5)), CONFIG: ConfigRecord({"server-round": 1})}
    )
    given = {"purpose": "train", "run_id": "run", "node_id": node("edge-1")}
    sign_reply(content, other, key=keys()["edge-1"], now_s=NOW.timestamp(), **given)  # type: ignore[arg-type]
    rewrite(entries, found[key("edge-1", 1)], data=content[ENVELOPE][ENVELOPE])  # type: ignore[index]


@pytest.mark.parametrize(
    ("edit", "kinds", "named"),
    [
        (drops, ["missing"], "round 1, train: 3 updates and 2 signatures"),
        (drops_of_a_reply, ["missing"], "no signature is kept with its reply"),
        (flips_a_bit, ["changed"], "client 'edge-1': what is kept was not signed with its key"),
        (swaps, ["changed", "changed"], "it signed for the node"),
        (swaps_bytes_alone, ["changed"], "client 'edge-0': what is kept was not signed"),
        (moves_to_another_round, ["changed"], "it signed for the round 1, and this is kept for 2"),
        (changes_the_reply, ["changed"], "its reply has the digest"),
        (adds, ["changed", "extra"], "it signed for the node"),
        (damages, ["changed"], "does not match the entry's digest"),
        (erases_a_round, ["missing"], "round 1, train: 1 record missing, although round 2 is"),
        (erases_a_record, ["missing"], "round 2, train: 1 record missing"),
        (damages_a_record, ["changed"], "round 1, train: the entry 'record' does not match"),
        (adds_a_record, ["extra"], "round 4, train: a record of this round, although the last"),
        (erases_a_reply, ["extra"], "no reply is kept with its signature"),
        (hides_when, ["changed"], "client 'edge-1': its signature was not in force at the time"),
        (moves_when, ["changed"], "client 'edge-1': its signature was not in force at the time"),
        (takes_one_of_another_past, ["changed"], "signed to start from 2 different models"),
    ],
)
def test_what_was_changed_is_named(
    tmp_path: Path, edit: Edit, kinds: list[str], named: str
) -> None:
    a_run(tmp_path)
    with closing(Entries(tmp_path / JOURNAL)) as entries:
        kinds_of = ("signature/train", "reply/train", RECORD)
        every = [one for kind in kinds_of for one in entries.of(kind)]
        edit(entries, {(one.kind, one.round, one.node): one for one in every})
    found = verified(tmp_path)
    assert sorted(fault.kind for fault in found.faults) == kinds
    with pytest.raises(SignatureInvalid) as raised:
        require_sound(found, where=tmp_path)
    assert named in str(raised.value)


def test_a_journal_of_an_earlier_time_is_given_away_by_its_copy(tmp_path: Path) -> None:
    a_run(tmp_path)
    copied = copied_entries(tmp_path)
    assert verified(tmp_path, copied=copied) == verified(tmp_path)
    kinds = (COMMIT, RECORD, *SIGNATURES, *(REPLY + purpose for purpose in PURPOSES))
    with closing(Entries(tmp_path / JOURNAL)) as entries:
        entries.write(drop=[(kind, 2, 3) for kind in kinds])
    assert verified(tmp_path).faults == (), "it is what it was after round 1"
    faults = [fault.what for fault in verified(tmp_path, copied=copied).faults]
    assert "the journal ends with round 1, and its copy with round 2" in faults
    assert "its record is only in the journal's copy" in faults
    assert len(faults) == 6


def test_a_count_that_was_lowered_with_a_signature_differs_from_the_copy(tmp_path: Path) -> None:
    a_run(tmp_path)
    copied = copied_entries(tmp_path)
    with closing(Entries(tmp_path / JOURNAL)) as entries:
        (old,) = entries.of(RECORD, 1)
        entries.write([new_entry(RECORD, 1, 0, old.values | {"updates": 2})])
        entries.remove([key("edge-1", 1)])
    faults = [fault.what for fault in verified(tmp_path, copied=copied).faults]
    assert "its record differs from the journal's copy" in faults
    assert f"node {node('edge-1')}: its signature is only in the journal's copy" in faults


def test_the_key_of_an_operator_signs_no_update(tmp_path: Path) -> None:
    a_run(tmp_path)
    roles = {
        print_: replace(one, role="operator" if one.name == "edge-2" else "device")
        for print_, one in MEMBERS().items()
    }
    faults = verified(tmp_path, known=roles.get).faults
    assert {(one.kind, one.what.partition(": ")[2]) for one in faults} == {
        ("unknown", "the key of 'edge-2' is not a device's but 'operator'")
    }


def of_a_file(folder: Path) -> Path:
    """The file with the weights of a reply of the current round."""
    with closing(Entries(folder / JOURNAL)) as entries:
        (place,) = (array[-1] for array in entries.one(*key("edge-1", 3, REPLY)).values["arrays"])  # type: ignore[union-attr]
    return folder / VALUES / str(place[0])


def test_a_file_without_an_end_is_not_read(tmp_path: Path) -> None:
    a_run(tmp_path, LARGE)
    os.truncate(of_a_file(tmp_path), 1 << 42)
    faults = verified(tmp_path).faults
    assert {one.kind for one in faults} == {"changed"}
    assert all("do not match the digest in its name" in one.what for one in faults)


def test_a_name_in_a_journal_makes_no_line_of_what_is_shown(tmp_path: Path) -> None:
    a_run(tmp_path, LARGE)
    with closing(Entries(tmp_path / JOURNAL)) as entries:
        old = entries.one(*key("edge-1", 3, REPLY))
        assert old is not None
        values = old.values
        values["arrays"][0][-1][0] = "x\nSignatures: 99 sound\x1b[2J" + "y" * 200
        entries.write([new_entry(old.kind, old.round, old.node, values, old.data)])
    (fault,) = verified(tmp_path).faults
    assert fault.kind == "changed"
    assert fault.what.isprintable()
    assert len(fault.what) < 700


def test_a_damaged_reply_goes_with_its_signature(tmp_path: Path) -> None:
    """Its device is asked again; until it has answered, the journal has none of it."""
    a_run(tmp_path)
    with closing(Entries(tmp_path / JOURNAL)) as entries:
        old = entries.one(*key("edge-1", 3, REPLY))
        assert old is not None
        entries.write([replace(old, sha256="0" * 64)])
    with opened(tmp_path) as journal:
        assert "replies were damaged" in journal.repairs
    assert verified(tmp_path).faults == ()


ENDLESS = "with recursive one(x) as (select 1 union all select x from one) select x from one"


@pytest.mark.parametrize(
    "change",
    [
        f"drop table entry; create view entry as {ENDLESS}",
        "create trigger more after insert on entry begin delete from entry; end",
        "alter table entry add column more as (hex(zeroblob(1000000)))",
    ],
)
def test_a_journal_that_would_run_code_is_rebuilt_from_its_copy(
    tmp_path: Path, change: str
) -> None:
    a_run(tmp_path)
    with closing(sqlite3.connect(tmp_path / JOURNAL)) as database:
        database.executescript(change)
    with pytest.raises(DataError, match="does not consist of the one table of a journal"):
        verified(tmp_path)
    with opened(tmp_path) as journal:
        assert "restored from its copy" in journal.repairs
    assert verified(tmp_path).updates == 6
