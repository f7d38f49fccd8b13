"""Verification of the signatures that a journal keeps: who sent each update that a round used.

`verify_signatures` checks every kept signature against the member list, the replies of the current
round against their signatures, and that no completed round is missing. `require_sound` turns what
it found wrong into an error.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

from flwr.app import MessageType

from fedcore.crypto.envelope import MAX_VALIDITY_S, SKEW_S, Envelope, read_envelope
from fedcore.crypto.roster import Member
from fedcore.errors import DataError, FedcoreError, SignatureInvalid
from fedcore.flower.fleet import node_id_of
from fedcore.observability.foreign import foreign
from fedcore.observability.words import counted
from fedcore.updates.seal import content_digest
from server.live.journal.blobs import Blobs
from server.live.journal.entries import Entries, JournalEntry, format_checked
from server.live.journal.head import COMMIT, PURPOSES, RECORD, REPLY, SIGNATURE
from server.live.journal.packing import content_from, signature_from

_Kind = Literal["missing", "extra", "changed", "unknown"]
_Verify = Callable[[JournalEntry, str, "JournalEntry | None"], tuple[Member, Envelope]]
Known = Callable[[str], Member | None]
"""Returns who has or had the key with this fingerprint, see `Roster.ever`."""
_NAMED = 3  # faults that an error names
_MAX_FAULT = 600  # characters of one
_CHECKED_ALONE = tuple(kind + purpose for kind in (REPLY, SIGNATURE) for purpose in PURPOSES)
"""Kinds of entries whose digests are checked with their signatures."""


@dataclass(frozen=True)
class SignatureFault:
    """One thing that the journal cannot prove."""

    kind: _Kind
    """``missing``: an update without a signature, or a round without a record; ``extra``: a
    signature of no update; ``changed``: a signature, a reply or another entry that does not match;
    ``unknown``: the key of no device."""
    round: int
    purpose: str
    """The type of message that was answered, ``train`` or ``evaluate``."""
    what: str
    """The client and what is wrong, in a phrase."""


@dataclass(frozen=True)
class Evidence:
    """What the devices' signatures in a run's journal prove, from `fedcore.verify_run`.

    Example::

        evidence = fedcore.verify_run("runs/churn", "authority/server")
        evidence.rounds, evidence.updates, evidence.faults
    """

    rounds: int
    """Number of completed rounds."""
    signatures: int
    """Number of signatures that are sound."""
    updates: int
    """Number of updates among what they cover; the others are evaluations."""
    clients: dict[str, int]
    """Number of sound signatures by client."""
    revoked: tuple[str, ...] = ()
    """Sound signatures that were accepted after their key was revoked, in phrases: the server got
    the member list with the revocation later."""
    faults: tuple[SignatureFault, ...] = ()
    """What the journal does not prove."""


@dataclass
class _Tally:
    """What has been found so far; filled in by `verify_signatures`."""

    sound: Counter[str] = field(default_factory=Counter)
    updates: int = 0
    revoked: list[str] = field(default_factory=list)
    faults: list[SignatureFault] = field(default_factory=list)
    bases: dict[int, set[str]] = field(default_factory=dict)
    """Digests of the models that the updates of each round were signed to start from."""


def verify_signatures(
    entries: Entries,
    blobs: Blobs,
    *,
    run_id: str,
    known: Known,
    copied: Sequence[JournalEntry] = (),
) -> Evidence:
    """Checks all signatures in a journal.

    A signature must be that of a key which the authority certified at some time: keys that were
    replaced or revoked since still prove what they signed. It must cover this run, the round, the
    node and the type of message under which it is kept, and have been in force when the server
    verified it. The updates of a round must start from one model. In the current round the reply
    itself must be there, and the signature must cover its bytes. Each round up to the last commit
    must have a record, and exactly one signature for each update that its record counts. Every
    entry must match its digest.

    Args:
        entries: The journal's entries.
        blobs: Its large values.
        run_id: The run's identity in signatures, see `fedcore.updates.seal.run_digest`.
        known: Returns the owner of a key.
        copied: The journal's second copy, read before ``entries``: the records and signatures in
            it must be the same.
    """
    tally = _Tally()
    commits, records = entries.of(COMMIT), entries.of(RECORD)
    last = max((commit.round for commit in commits), default=0)
    tally.faults += _damaged(entries.damaged())
    tally.faults += _lost(copied, entries, last)
    tally.faults += _gaps({record.round for record in records}, last)
    verify = partial(_verify, blobs=blobs, run_id=run_id, known=known)
    for purpose in PURPOSES:
        found = _take(tally, entries, purpose, last, verify)
        if purpose == MessageType.TRAIN:
            tally.faults += _counts(records, found)
    tally.faults += _forks(tally.bases)
    faults = sorted(tally.faults, key=lambda one: (one.round, one.purpose))
    rounds, total = len(records), sum(tally.sound.values())
    clients = dict(sorted(tally.sound.items()))
    return Evidence(rounds, total, tally.updates, clients, tuple(tally.revoked), tuple(faults))


def require_sound(evidence: Evidence, *, where: Path) -> None:
    """Checks that nothing is wrong.

    Raises:
        SignatureInvalid: something is; the message names the first faults.
    """
    if not evidence.faults:
        return
    kinds = Counter(fault.kind for fault in evidence.faults)
    counts = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
    named = "; ".join(
        f"round {one.round}, {one.purpose}: {one.what}" for one in evidence.faults[:_NAMED]
    )
    raise SignatureInvalid(
        f"{where}: {counted(len(evidence.faults), 'fault')} in the signatures of replies "
        f"({counts}). {named}{'; ...' if len(evidence.faults) > _NAMED else ''}. The journal does "
        "not prove who sent these; look who may write to this folder, and restore it from a backup "
        "that is sound."
    )


def _take(
    tally: _Tally, entries: Entries, purpose: str, last: int, verify: _Verify
) -> Counter[int]:
    """Adds the replies to one type of message to ``tally``.

    Args:
        tally: Gets what is found.
        entries: The journal's entries.
        purpose: The type of message.
        last: The last completed round, after which replies are kept with their signatures.
        verify: `_verify` for this journal.

    Returns:
        The number of signatures in each round, sound or not.
    """
    found = Counter[int]()
    replies = {(one.round, one.node): one for one in entries.of(REPLY + purpose)}
    for entry in entries.of(SIGNATURE + purpose):
        found[entry.round] += 1
        reply = replies.pop((entry.round, entry.node), None)
        if reply is None and entry.round > last:
            what = f"node {entry.node}: no reply is kept with its signature"
            tally.faults.append(_fault("extra", entry.round, purpose, what))
            continue
        try:
            member, envelope = verify(entry, purpose, reply)
        except FedcoreError as error:
            kind: _Kind = "unknown" if isinstance(error, _UnknownKey) else "changed"
            tally.faults.append(_fault(kind, entry.round, purpose, str(error)))
            continue
        tally.sound[member.name] += 1
        tally.revoked += _revoked(entry, member)
        if purpose == MessageType.TRAIN:
            tally.updates += 1
            tally.bases.setdefault(entry.round, set()).add(envelope.base_sha256)
    for number, node in replies:
        what = f"node {node}: no signature is kept with its reply"
        tally.faults.append(_fault("missing", number, purpose, what))
    return found


class _UnknownKey(SignatureInvalid):
    """A signature with a key that never belonged to a device."""


def _verify(
    entry: JournalEntry,
    purpose: str,
    reply: JournalEntry | None,
    *,
    blobs: Blobs,
    run_id: str,
    known: Known,
) -> tuple[Member, Envelope]:
    """Returns who made a signature, and what it covers.

    Raises:
        _UnknownKey: its key is no device's in the member list.
        FedcoreError: the signature, or the reply that it covers, was changed.
    """
    where = f"node {entry.node}"
    if not entry.is_intact:
        raise DataError(f"{where}: its signature does not match the entry's digest")
    kept = signature_from(entry)
    member = known(kept.signer)
    if member is None:
        raise _UnknownKey(f"{where}: the member list has no such key, nor ever had")
    if member.role != "device":
        name = foreign(member.name, 100)
        raise _UnknownKey(f"{where}: the key of {name!r} is not a device's but {member.role!r}")
    where = f"client '{foreign(member.name, 100)}'"
    try:
        envelope = read_envelope(kept.envelope, member.public, where=where)
    except SignatureInvalid:
        raise SignatureInvalid(f"{where}: what is kept was not signed with its key") from None
    expected = {
        "node": (node_id_of(member.public), entry.node),
        "node of its key": (node_id_of(member.public), envelope.node_id),
        "round": (envelope.round, entry.round),
        "type of message": (envelope.purpose, purpose),
        "run": (envelope.run_id, run_id),
    }
    for what, (signed, kept_under) in expected.items():
        if signed != kept_under:
            raise SignatureInvalid(
                f"{where}: it signed for the {what} {signed!r}, and this is kept for {kept_under!r}"
            )
    left_s = envelope.expires_at_s - kept.verified_at_s
    if not -SKEW_S <= left_s <= MAX_VALIDITY_S + SKEW_S:  # nor if that is not a number
        raise SignatureInvalid(
            f"{where}: its signature was not in force at the time at which it is said to have been "
            "verified"
        )
    if reply is not None:
        _verify_reply(reply, envelope, blobs, where)
    return member, envelope


def _verify_reply(reply: JournalEntry, envelope: Envelope, blobs: Blobs, where: str) -> None:
    if not reply.is_intact:
        raise DataError(f"{where}: its reply does not match the entry's digest")
    content = content_from(reply, blobs, where=where)
    with format_checked(reply):
        digest = content_digest(content)
    if digest != envelope.payload_sha256:
        raise SignatureInvalid(
            f"{where}: its reply has the digest sha256:{digest[:16]}.., and it signed one with "
            f"sha256:{envelope.payload_sha256[:16]}.."
        )


def _revoked(entry: JournalEntry, member: Member) -> Iterator[str]:
    accepted_at_s = signature_from(entry).verified_at_s
    if member.revoked_at is not None and accepted_at_s > member.revoked_at.timestamp():
        late_s = accepted_at_s - member.revoked_at.timestamp()
        yield (
            f"round {entry.round}: client '{foreign(member.name, 100)}' was revoked {late_s:.0f} s "
            "before its reply was accepted"
        )


def _damaged(entries: Sequence[JournalEntry]) -> Iterator[SignatureFault]:
    """Yields a fault for each entry that does not match its digest, besides those of replies."""
    for entry in entries:
        if entry.kind not in _CHECKED_ALONE:
            what = f"the entry {entry.kind!r} does not match its digest"
            yield _fault("changed", entry.round, MessageType.TRAIN, what)


def _lost(copied: Sequence[JournalEntry], entries: Entries, last: int) -> Iterator[SignatureFault]:
    """Yields a fault for each record and signature that the journal's copy has otherwise."""
    later = max((one.round for one in copied if one.kind == COMMIT), default=0)
    if later > last:
        what = f"the journal ends with round {last}, and its copy with round {later}"
        yield _fault("missing", later, MessageType.TRAIN, what)
    kinds = {RECORD: MessageType.TRAIN} | {SIGNATURE + purpose: purpose for purpose in PURPOSES}
    for kind, purpose in kinds.items():
        kept = {(one.round, one.node): one.sha256 for one in entries.of(kind)}
        for one in copied:
            if one.kind == kind and kept.get((one.round, one.node)) != one.sha256:
                what = f"node {one.node}: its signature" if one.node else "its record"
                there = "differs from" if (one.round, one.node) in kept else "is only in"
                yield _fault("changed", one.round, purpose, f"{what} {there} the journal's copy")


def _gaps(kept: Set[int], last: int) -> Iterator[SignatureFault]:
    """Yields a fault if not exactly the rounds 1 to ``last`` have a record."""
    present = {number for number in kept if 1 <= number <= last}
    if count := last - len(present):
        first = next(number for number in itertools.count(1) if number not in present)
        what = f"{counted(count, 'record')} missing, although round {last} is complete"
        yield _fault("missing", first, MessageType.TRAIN, what)
    for number in sorted(kept - present)[:_NAMED]:
        what = f"a record of this round, although the last complete one is {last}"
        yield _fault("extra", number, MessageType.TRAIN, what)


def _forks(bases: Mapping[int, Set[str]]) -> Iterator[SignatureFault]:
    """Yields a fault for each round whose updates were signed to start from several models."""
    for number, digests in bases.items():
        if len(digests) > 1:
            what = f"its updates are signed to start from {len(digests)} different models"
            yield _fault("changed", number, MessageType.TRAIN, what)


def _counts(records: Sequence[JournalEntry], found: Counter[int]) -> Iterator[SignatureFault]:
    """Yields a fault for each completed round with fewer or more signatures than updates."""
    for record in records:
        with format_checked(record):
            updates = int(record.values["updates"])
        gap = updates - found[record.round]
        if gap:
            kind: _Kind = "missing" if gap > 0 else "extra"
            what = f"{counted(updates, 'update')} and {counted(found[record.round], 'signature')}"
            yield _fault(kind, record.round, MessageType.TRAIN, what)


def _fault(kind: _Kind, number: int, purpose: str, what: str) -> SignatureFault:
    return SignatureFault(kind, number, purpose, foreign(what.rstrip("."), _MAX_FAULT))
