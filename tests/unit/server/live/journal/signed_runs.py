"""Journals of a run whose replies are signed by the keys of devices, for tests."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path

from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict

from fedcore.crypto.keys import new_key, public_bytes
from fedcore.crypto.roster import Member
from fedcore.flower.fleet import node_id_of
from fedcore.updates.messages import ARRAYS, CONFIG, METRICS, weights_record
from fedcore.updates.seal import base_digest, sign_reply, verify_reply
from server.live.journal.blobs import Blobs
from server.live.journal.entries import Entries, JournalEntry, new_entry
from server.live.journal.evidence import Evidence, verify_signatures
from server.live.journal.head import (
    JOURNAL,
    SIGNATURE,
)
from server.live.journal.journal import VALUES, Journal, create
from server.rounds.cohort import Cohort
from tests.unit.server.live.journal.journals import (
    IDENTITY,
    SMALL,
    progress,
    record,
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


Edit = Callable[[Entries, dict[tuple[str, int, int], JournalEntry]], None]


def key(name: str, number: int, kind: str = SIGNATURE) -> tuple[str, int, int]:
    return f"{kind}train", number, node(name)


def rewrite(entries: Entries, old: JournalEntry, **changes: object) -> None:
    """Writes an entry with a digest that fits: what whoever can write to the folder can do."""
    new = replace(old, **changes)  # type: ignore[arg-type]
    entries.write([new_entry(new.kind, new.round, new.node, new.values, new.data)])
