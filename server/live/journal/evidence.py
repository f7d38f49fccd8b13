"""Verification of the signatures that a journal keeps: who sent each update that a round used.

`verify_signatures` checks every kept signature against the member list, and the replies of the
current round against their signatures. `require_sound` turns what it found wrong into an error.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from flwr.app import MessageType

from fedcore.crypto.envelope import Envelope, read_envelope
from fedcore.crypto.roster import Member
from fedcore.errors import DataError, FedcoreError, SignatureInvalid
from fedcore.flower.fleet import node_id_of
from fedcore.observability.foreign import foreign
from fedcore.observability.words import counted
from fedcore.updates.seal import content_digest
from server.live.journal.blobs import Blobs
from server.live.journal.entries import Entries, JournalEntry, format_checked
from server.live.journal.head import PURPOSES, RECORD, REPLY, SIGNATURE
from server.live.journal.packing import content_from, signature_from

Known = Callable[[str], Member | None]
"""Returns who has or had the key with this fingerprint, see `Roster.ever`."""
_NAMED = 3  # faults that an error names


@dataclass(frozen=True)
class SignatureFault:
    """One thing that the journal cannot prove."""

    kind: Literal["missing", "extra", "changed", "unknown"]
    """``missing``: an update without a signature; ``extra``: a signature of no update;
    ``changed``: a signature or a reply that does not match; ``unknown``: the key of no member."""
    round: int
    purpose: str
    """The type of message that was answered, ``train`` or ``evaluate``."""
    what: str
    """The client and what is wrong, in a phrase."""


@dataclass(frozen=True)
class Evidence:
    """What the signatures in a journal prove."""

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


@dataclass
class _Tally:
    """What has been found so far; filled in by `verify_signatures`."""

    sound: Counter[str] = field(default_factory=Counter)
    updates: int = 0
    revoked: list[str] = field(default_factory=list)
    faults: list[SignatureFault] = field(default_factory=list)


def verify_signatures(entries: Entries, blobs: Blobs, *, run_id: str, known: Known) -> Evidence:
    """Checks all signatures in a journal.

    A signature must be that of a key which the authority certified at some time: keys that were
    replaced or revoked since still prove what they signed. It must cover this run, the round, the
    node and the type of message under which it is kept. While a reply itself is still there, in the
    current round, the signature must cover its bytes. A committed round must have exactly one
    signature for each update that its record counts.

    Args:
        entries: The journal's entries.
        blobs: Its large values.
        run_id: The run's identity in signatures, see `fedcore.updates.seal.run_digest`.
        known: Returns the owner of a key.
    """
    tally = _Tally()
    for purpose in PURPOSES:
        found = Counter[int]()
        replies = {(one.round, one.node): one for one in entries.of(REPLY + purpose)}
        for entry in entries.of(SIGNATURE + purpose):
            found[entry.round] += 1
            reply = replies.pop((entry.round, entry.node), None)
            try:
                member = _verify(entry, purpose, reply, blobs, run_id=run_id, known=known)
            except FedcoreError as error:
                tally.faults.append(_fault("changed", entry.round, purpose, str(error)))
                continue
            if member is None:
                what = f"node {entry.node}: the member list has no such key, nor ever had"
                tally.faults.append(_fault("unknown", entry.round, purpose, what))
                continue
            tally.sound[member.name] += 1
            tally.updates += purpose == MessageType.TRAIN
            tally.revoked += _revoked(entry, member)
        for number, node in replies:
            what = f"node {node}: no signature is kept with its reply"
            tally.faults.append(_fault("missing", number, purpose, what))
        if purpose == MessageType.TRAIN:
            tally.faults += _counts(entries.of(RECORD), found)
    faults = sorted(tally.faults, key=lambda one: (one.round, one.purpose))
    rounds, total = len(entries.of(RECORD)), sum(tally.sound.values())
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


def _verify(
    entry: JournalEntry,
    purpose: str,
    reply: JournalEntry | None,
    blobs: Blobs,
    *,
    run_id: str,
    known: Known,
) -> Member | None:
    """Returns who made a signature; None if its key is not in the member list.

    Raises:
        FedcoreError: the signature, or the reply that it covers, was changed.
    """
    where = f"node {entry.node}"
    if not entry.is_intact:
        raise DataError(f"{where}: its signature does not match the entry's digest")
    kept = signature_from(entry)
    member = known(kept.signer)
    if member is None:
        return None
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
    if reply is not None:
        _verify_reply(reply, envelope, blobs, where)
    return member


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


def _counts(records: Sequence[JournalEntry], found: Counter[int]) -> Iterator[SignatureFault]:
    """Yields a fault for each completed round with fewer or more signatures than updates."""
    for record in records:
        with format_checked(record):
            updates = int(record.values["updates"])
        gap = updates - found[record.round]
        if gap:
            kind: Literal["missing", "extra"] = "missing" if gap > 0 else "extra"
            what = f"{counted(updates, 'update')} and {counted(found[record.round], 'signature')}"
            yield _fault(kind, record.round, MessageType.TRAIN, what)


def _fault(
    kind: Literal["missing", "extra", "changed", "unknown"], number: int, purpose: str, what: str
) -> SignatureFault:
    return SignatureFault(kind, number, purpose, what.rstrip("."))
