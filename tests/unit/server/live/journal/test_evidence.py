"""What the signatures in a journal prove, and how a journal that was tampered with is found out."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path

import pytest
from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict

from fedcore.crypto.keys import new_key, public_bytes
from fedcore.crypto.roster import Member
from fedcore.errors import SignatureInvalid
from fedcore.flower.fleet import node_id_of
from fedcore.updates.messages import ARRAYS, CONFIG, ENVELOPE, METRICS, weights_record
from fedcore.updates.seal import base_digest, sign_reply, verify_reply
from server.live.journal.blobs import Blobs
from server.live.journal.entries import Entries, JournalEntry, new_entry
from server.live.journal.evidence import Evidence, require_sound, verify_signatures
from server.live.journal.head import JOURNAL, SIGNATURE
from server.live.journal.journal import VALUES, Journal, create
from server.rounds.cohort import Cohort
from tests.unit.server.live.journal.journals import (
    IDENTITY,
    LARGE,
    SMALL,
    opened,
    progress,
    record,
    signed,
    vector,
)

NOW = datetime(2026, 5, 1, tzinfo=UTC)
NAMES = ("edge-0", "edge-1", "edge-2")


@cache
def keys() -> dict[str, object]:
    return {name: new_key() for name in NAMES}


def member(name: str, revoked_at: datetime | None = None) -> Member:
    public = public_bytes(keys()[name])  # type: ignore[arg-type]
    return Member(name, "device", public, "1", NOW + timedelta(days=1), None, revoked_at)


MEMBERS = cache(lambda: {member(name).fingerprint: member(name) for name in NAMES})


def node(name: str) -> int:
    return node_id_of(member(name).public)


def asked(name: str, number: int, purpose: str = "train") -> Message:
    content = RecordDict(
        {ARRAYS: weights_record(vector(number - 1)), CONFIG: ConfigRecord({"server-round": number})}
    )
    return Message(content, node(name), purpose)


def reply(
    name: str, number: int, *, purpose: str = "train", run_id: str = "run", size: int = SMALL
) -> Message:
    """A device's reply, as the server has it once its signature is verified."""
    message = asked(name, number, purpose)
    content = RecordDict(
        {
            ARRAYS: weights_record(vector(number / 3, size)),
            METRICS: MetricRecord({"num-examples": 7, "train_loss": 1 / 3}),
        }
    )
    given = {"purpose": purpose, "run_id": run_id, "node_id": node(name)}
    now_s = NOW.timestamp()
    sign_reply(content, message.content, key=keys()[name], now_s=now_s, **given)  # type: ignore[arg-type]
    base = base_digest(message.content)
    public = member(name).public
    verify_reply(
        content,
        round=number,
        base_sha256=base,
        public_key=public,
        now_s=now_s,
        **given,  # type: ignore[arg-type]
    )
    return Message(content, reply_to=message)


def run_round(journal: Journal, number: int, size: int = SMALL) -> None:
    nodes = [node(name) for name in NAMES]
    journal.record_cohort("train", Cohort(nodes, dict.fromkeys(nodes, 5)))
    for name in NAMES:
        journal.accept(reply(name, number, size=size))
    journal.record_cohort("evaluate", Cohort(nodes[:1], {nodes[0]: 1}))
    journal.accept(reply(NAMES[0], number, purpose="evaluate"))
    journal.commit(progress(number, size), record(number))


def a_run(folder: Path, size: int = SMALL) -> None:
    """Two rounds that are over, and one in which two of three devices have answered."""
    with closing(create(folder, IDENTITY)) as journal:
        journal.commit(progress(0, size), None)
        for number in (1, 2):
            run_round(journal, number, size)
        nodes = [node(name) for name in NAMES]
        journal.record_cohort("train", Cohort(nodes, dict.fromkeys(nodes, 5)))
        for name in NAMES[:2]:
            journal.accept(reply(name, 3, size=size))


def verified(folder: Path, **changes: object) -> Evidence:
    members = MEMBERS()
    with closing(Entries(folder / JOURNAL)) as entries:
        given: dict[str, object] = {"run_id": "run", "known": members.get} | changes
        return verify_signatures(entries, Blobs(folder / VALUES), **given)  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [SMALL, LARGE])
def test_each_update_is_its_devices(tmp_path: Path, size: int) -> None:
    a_run(tmp_path, size)
    found = verified(tmp_path)
    assert found == Evidence(2, 10, 8, {"edge-0": 5, "edge-1": 3, "edge-2": 2})
    require_sound(found, where=tmp_path)


def test_signatures_outlive_a_resume_and_the_journals_file(tmp_path: Path) -> None:
    a_run(tmp_path)
    with opened(tmp_path) as journal:
        for name in NAMES:  # the last one answers the resumed server
            if journal.reply(asked(name, 3)) is None:
                journal.accept(reply(name, 3))
        journal.commit(progress(3), record(3))
    assert verified(tmp_path).updates == 9
    (tmp_path / JOURNAL).write_bytes(b"nothing like it")
    with opened(tmp_path) as journal:
        assert "restored from its copy" in journal.repairs
    found = verified(tmp_path)
    assert (found.updates, found.signatures, found.faults) == (9, 11, ())


def test_a_reply_that_the_round_did_not_use_leaves_no_signature(tmp_path: Path) -> None:
    """The server was restarted, and its round selected others."""
    a_run(tmp_path)
    with opened(tmp_path) as journal:
        journal.drop_cohorts()
        journal.record_cohort("train", Cohort([node(NAMES[0]), node(NAMES[2])]))
        assert journal.reply(asked(NAMES[0], 3)) is not None
        journal.accept(reply(NAMES[2], 3))
        journal.commit(progress(3), replace(record(3), updates=2))
    found = verified(tmp_path)
    assert found.faults == ()
    assert found.updates == 8


def test_a_round_that_used_no_reply_leaves_no_signature(tmp_path: Path) -> None:
    """Under client-level privacy a round may end without updates."""
    a_run(tmp_path)
    with opened(tmp_path) as journal:
        journal.drop_cohorts()
        journal.record_cohort("train", Cohort([]))
        journal.commit(progress(3), replace(record(3), updates=0))
    found = verified(tmp_path)
    assert found.faults == ()
    assert found.updates == 6


def test_what_is_refused_or_rolled_back_leaves_no_signature(tmp_path: Path) -> None:
    a_run(tmp_path)
    with opened(tmp_path) as journal:
        assert journal.reply(asked(NAMES[0], 3)) is not None
        assert journal.discard("train", node(NAMES[0]))
    assert verified(tmp_path).updates == 7
    with opened(tmp_path) as journal:
        journal.roll_back(1)
    assert verified(tmp_path) == Evidence(1, 4, 3, {"edge-0": 2, "edge-1": 1, "edge-2": 1})


def test_nothing_is_accepted_without_a_signature(tmp_path: Path) -> None:
    with closing(create(tmp_path, IDENTITY)) as journal:
        bare = reply(NAMES[0], 1)
        del bare.content[ENVELOPE]
        with pytest.raises(SignatureInvalid, match=r"round 1: reply from node .* no verified"):
            journal.accept(bare)
        assert not journal.holds("train", node(NAMES[0]))
        assert journal.reply(asked(NAMES[0], 1)) is None


Edit = Callable[[Entries, dict[tuple[str, int, int], JournalEntry]], None]


def key(name: str, number: int, kind: str = SIGNATURE) -> tuple[str, int, int]:
    return f"{kind}train", number, node(name)


def rewrite(entries: Entries, old: JournalEntry, **changes: object) -> None:
    """Writes an entry with a digest that fits: what whoever can write to the folder can do."""
    new = replace(old, **changes)  # type: ignore[arg-type]
    entries.write([new_entry(new.kind, new.round, new.node, new.values, new.data)])


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
    ],
)
def test_what_was_changed_is_named(
    tmp_path: Path, edit: Edit, kinds: list[str], named: str
) -> None:
    a_run(tmp_path)
    with closing(Entries(tmp_path / JOURNAL)) as entries:
        every = [one for kind in ("signature/train", "reply/train") for one in entries.of(kind)]
        edit(entries, {(one.kind, one.round, one.node): one for one in every})
    found = verified(tmp_path)
    assert sorted(fault.kind for fault in found.faults) == kinds
    with pytest.raises(SignatureInvalid) as raised:
        require_sound(found, where=tmp_path)
    assert named in str(raised.value)


def test_another_run_and_a_key_that_nobody_had_prove_nothing(tmp_path: Path) -> None:
    a_run(tmp_path)
    assert {one.kind for one in verified(tmp_path, run_id="other").faults} == {"changed"}
    rest = {print_: one for print_, one in MEMBERS().items() if one.name != "edge-2"}
    found = verified(tmp_path, known=rest.get)
    assert [(one.kind, one.round) for one in found.faults] == [("unknown", 1), ("unknown", 2)]
    assert found.clients == {"edge-0": 5, "edge-1": 3}


def test_a_key_that_was_revoked_or_replaced_still_proves_what_it_signed(tmp_path: Path) -> None:
    a_run(tmp_path)
    later = {
        print_: replace(one, revoked_at=NOW + timedelta(hours=1), not_after=NOW)
        for print_, one in MEMBERS().items()
    }
    assert verified(tmp_path, known=later.get) == verified(tmp_path)
    before = {
        print_: replace(one, revoked_at=NOW - timedelta(minutes=2) if "1" in one.name else None)
        for print_, one in MEMBERS().items()
    }
    found = verified(tmp_path, known=before.get)
    assert found.faults == ()
    assert [line for line in found.revoked if "'edge-1' was revoked 120 s before" in line]
    assert len(found.revoked) == 3


def test_a_placeholder_is_of_no_key(tmp_path: Path) -> None:
    with closing(create(tmp_path, IDENTITY)) as journal:
        journal.accept(signed(reply(NAMES[0], 1)))
    (fault,) = verified(tmp_path).faults
    assert fault.kind == "unknown"
