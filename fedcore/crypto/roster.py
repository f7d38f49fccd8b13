"""The server's view of a project: its own identity, and the roster of admitted members.

`load_server_identity` reads the identity; `Roster` looks members up by key.
"""

from __future__ import annotations

import json
import ssl
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from pydantic import AwareDatetime, Field, ValidationError

from fedcore.config.section import Section
from fedcore.crypto.certificates import SKEW, MemberRole, parse_certificate, subject_of
from fedcore.crypto.keys import fingerprint
from fedcore.crypto.kit import KIT, Kit, Pem, load_identity, restrict
from fedcore.crypto.roster_seal import Signature, Signer, check_signed, sign_content
from fedcore.crypto.roster_seen import NOTHING_SEEN, SEEN, Seen, read_seen, write_seen
from fedcore.errors import CertificateRefused, DataError, FedcoreError, RollbackRefused, TrustError
from fedcore.files import name_exists, read_bytes
from fedcore.observability.faults import first_fault

ROSTER = "roster.json"
MAX_ROSTER_BYTES = 32 << 20  # 32 MiB: some 25,000 members at 1.2 kB
MAX_NUM_EXAMPLES = 1_000_000
"""Largest weight of one client's updates, in examples: bounds the number set at enrolment."""


class RosterEntry(Section):
    """One member in ``roster.json``; name, role and key are only in the certificate."""

    certificate: Pem
    num_examples: Annotated[int, Field(ge=1, le=MAX_NUM_EXAMPLES)] | None = None
    revoked_at: AwareDatetime | None = None


class RosterFile(Section):
    """``roster.json``: everyone who ever had a certificate, with revocations marked."""

    format: Literal["fedcore.roster/1"] = "fedcore.roster/1"
    version: Annotated[int, Field(ge=1)]
    """Increases with each change."""
    members: tuple[RosterEntry, ...]
    signer: Signer | None = None
    """The delegated signer; None if the authority itself signed."""
    signature: Signature | None = None
    """Signature over all other fields: members, revocations and weights of updates."""

    def to_bytes(self) -> bytes:
        """Returns the file's content."""
        return (self.model_dump_json(indent=1) + "\n").encode()

    def content(self) -> bytes:
        """Returns the bytes that the signature covers."""
        rest = self.model_dump(mode="json", exclude={"signature"})
        return json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()

    def signed(self, key: EllipticCurvePrivateKey, signer: Signer | None = None) -> RosterFile:
        """Returns a copy signed by ``key``, that of ``signer`` or, if None, of the authority."""
        file = self.model_copy(update={"signer": signer, "signature": None})
        return file.model_copy(update={"signature": sign_content(file.content(), key)})


@dataclass(frozen=True)
class Member:
    """A holder of a certificate that the authority issued."""

    name: str
    role: MemberRole
    public: bytes
    """Public key in PEM, from `fedcore.crypto.keys.public_bytes`."""
    serial: str
    """Serial number of the newest certificate, in hexadecimal."""
    not_after: datetime
    """When that certificate expires, UTC."""
    num_examples: int | None
    """Weight of its updates, set at enrolment; None: as much as any other's."""
    revoked_at: datetime | None

    @property
    def fingerprint(self) -> str:
        """The key's fingerprint."""
        return fingerprint(self.public)

    def in_force(self, now: datetime) -> bool:
        """Returns whether the member is unrevoked and not expired, with an allowance for clocks."""
        return self.revoked_at is None and now <= self.not_after + SKEW


@dataclass(frozen=True)
class ServerIdentity:
    """The server's key and certificate, and the path of its roster."""

    kit: Kit
    hosts: tuple[str, ...]
    """The names and addresses in its certificate."""
    port: int
    """TCP port that devices connect to."""
    roster_path: Path

    def roster(self, *, clock: Callable[[], datetime] | None = None) -> Roster:
        """Opens the roster, and rejects a version older than this server has ever used.

        ``clock`` returns the time, UTC, for expiry; None for the system's clock.

        Raises:
            DataError: the file is missing or unreadable.
            TrustError: the roster is invalid or too old, see `Roster`.
        """
        seen = self.kit.folder / SEEN
        more = {"clock": clock} if clock is not None else {}
        return Roster(self.roster_path, self.kit.authority_pem, seen=seen, **more)


def load_server_identity(folder: Path, *, now: datetime | None = None) -> ServerIdentity:
    """Reads the server's identity from the folder that `fedcore provision server` created.

    Raises:
        DataError: a file is missing or unreadable.
        CertificateRefused: `fedcore.crypto.kit.load_identity` rejects it, or it is not a server's.
    """
    check_server_folder(folder)
    kit = load_identity(folder, now=now)
    if kit.role != "server":
        raise CertificateRefused(
            f"{folder}: this is the identity of the {kit.role} {kit.name!r}, expected a "
            "server's. Nothing was started; use the folder created by `fedcore provision server`."
        )
    certificate = x509.load_pem_x509_certificate(kit.certificate_pem)
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return ServerIdentity(
        kit=kit,
        hosts=tuple(str(name.value) for name in names),
        port=int(kit.servers[0].rpartition(":")[2]),
        roster_path=folder / ROSTER,
    )


def check_server_folder(folder: Path) -> None:
    """Checks that a folder contains an identity.

    Raises:
        DataError: the folder or the identity is missing.
    """
    if not name_exists(folder / KIT):
        what = f"this folder contains no {KIT}" if folder.is_dir() else "there is no such folder"
        raise DataError(
            f"{folder}: {what}, expected a server's identity. No server was started or "
            "contacted; pass the folder with --identity, e.g. --identity authority/server. To "
            "create an identity, run `fedcore provision init` and `fedcore provision server "
            "HOST`; to restore a lost one from a backup, run `fedcore provision restore`."
        )


def server_context(identity: ServerIdentity) -> ssl.SSLContext:
    """Returns TLS settings for the server's port: version 1.3, with a project client certificate.

    TLS does not check revocation: a revoked member completes the handshake, so the code that
    accepts a connection must look the peer's key up in the `Roster` before anything else.
    """
    context = restrict(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), identity.kit)
    context.num_tickets = 0  # a resumed session would skip the certificate, and its expiry
    return context


def parse_roster(
    raw: bytes,
    authority: x509.Certificate,
    *,
    where: str,
    known: Mapping[str, Member] | None = None,
    unsigned: bool = False,
) -> tuple[RosterFile, dict[str, Member]]:
    """Reads a roster, and verifies its signature and every certificate in it.

    Args:
        raw: The file's content.
        authority: The only accepted issuer of certificates.
        where: The file, for errors.
        known: Members verified before, by certificate (PEM); verification takes about 0.8 ms each.
        unsigned: Accepts a roster without a signature, from a project created before signing.

    Returns:
        The file, and its members by certificate (PEM), in the file's order.

    Raises:
        SignatureInvalid: the roster is unsigned, or was changed since.
        TrustError: the content is no roster, a certificate is not the authority's, two members
            have one key, or two unrevoked members have one name.
    """
    try:
        file = RosterFile.model_validate_json(raw)
    except ValidationError as error:
        raise TrustError(
            f"{where}: {first_fault(error)}. This is not a valid roster and was not used; copy "
            "it again from the authority's folder."
        ) from None
    if file.signature is not None or not unsigned:
        check_signed(file.content(), file.signature, file.signer, authority, where=where)
    members = {}
    for number, entry in enumerate(file.members):
        member = (known or {}).get(entry.certificate) or _member(
            entry, authority, where=f"{where}: member {number}"
        )
        members[entry.certificate] = replace(
            member, num_examples=entry.num_examples, revoked_at=entry.revoked_at
        )
    keys = [member.public for member in members.values()]
    names = [member.name for member in members.values() if member.revoked_at is None]
    if len({*keys}) < len(file.members) or len({*names}) < len(names):
        raise TrustError(
            f"{where}: two members share a key or a name, but each must have its own. The roster "
            "was not used; copy the file again from the authority's folder."
        )
    return file, members


class Roster:
    """The members that a server admits; rereads the file when it changes.

    A lookup costs one ``stat`` while the file is unchanged. A changed file that is unreadable,
    invalid or older than the last one is ignored: the previous list stays in force and `damage`
    contains the reason, so that a mistake in copying does not stop a federation. A damaged file
    admits nobody, because each entry is a certificate that the authority signed. Safe for use from
    several threads.
    """

    def __init__(
        self,
        path: Path,
        authority_pem: bytes,
        *,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
        seen: Path | None = None,
    ) -> None:
        """Reads the roster.

        Args:
            path: ``roster.json``.
            authority_pem: Certificate of the authority that signs its members.
            clock: Returns the time, UTC; expired members are left out.
            seen: File that stores the highest version across restarts; None to store nothing.

        Raises:
            DataError: the roster is missing or unreadable.
            RollbackRefused: it is older than one that was in force before.
            TrustError: it is invalid (see `parse_roster`).
        """
        self.damage: str | None = None
        """Why the file on disk is not in force; None if it is."""
        self._path = path
        self._authority = parse_certificate(authority_pem, where="authority")
        self._clock = clock
        self._lock = threading.Lock()
        self._seen = seen
        self._version = 0
        self._had = read_seen(seen) if seen is not None else NOTHING_SEEN
        self._by_certificate: dict[str, Member] = {}
        self._by_fingerprint: dict[str, Member] = {}
        self._stamp = self._read_stamp()
        self._read()

    @property
    def version(self) -> int:
        """The version of the list in force."""
        return self._version

    def member(self, identity: bytes | str) -> Member | None:
        """Returns the member with this key, or None if unknown, revoked or expired.

        Args:
            identity: The key from `fedcore.crypto.keys.public_bytes`, or its fingerprint.
        """
        self.refresh()
        name = identity if isinstance(identity, str) else fingerprint(identity)
        member = self._by_fingerprint.get(name)
        return member if member is not None and member.in_force(self._clock()) else None

    def ever(self, identity: str) -> Member | None:
        """Returns who has or had the key with this fingerprint, also if revoked or expired.

        A member that got a new key is there under each of its keys. None for a key that the
        authority never certified.
        """
        self.refresh()
        return self._by_fingerprint.get(identity)

    def members(self) -> tuple[Member, ...]:
        """Returns all members in force now, in the order of enrolment."""
        self.refresh()
        now = self._clock()
        return tuple(member for member in self._by_fingerprint.values() if member.in_force(now))

    def refresh(self) -> None:
        """Rereads the file if it has changed; `member` and `members` call this."""
        stamp = self._read_stamp()
        if stamp == self._stamp:
            return
        with self._lock:
            if stamp == self._stamp:  # another thread has read it meanwhile
                return
            self._stamp = stamp
            try:
                self._read()
            except FedcoreError as error:
                self.damage = str(error)
            else:
                self.damage = None

    def _read_stamp(self) -> tuple[int, ...]:
        """Returns values that change with the file; empty if there is no file."""
        try:
            stat = self._path.stat()
        except OSError:
            return ()
        return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns

    def _read(self) -> None:
        raw = read_bytes(
            self._path, max_bytes=MAX_ROSTER_BYTES, what="the roster", otherwise=_NO_ROSTER
        )
        file, members = parse_roster(
            raw, self._authority, where=str(self._path), known=self._by_certificate
        )
        signer = file.signer.number if file.signer is not None else 0
        if file.version < self._had.version or signer < self._had.signer:
            old = f"version {file.version}, but version {self._had.version} was in force before"
            if signer < self._had.signer:
                old = f"the signature of key {signer}, which key {self._had.signer} has replaced"
            raise RollbackRefused(
                f"{self._path}: this roster is outdated: it has {old}. An older roster would "
                "admit revoked members again, so it was not used; copy the newest from the "
                "authority's folder. If that is lost, revoke again everyone revoked since, and "
                f"remove {SEEN} from the server's folder."
            )
        self._version, self._by_certificate = file.version, members
        self._by_fingerprint = {member.fingerprint: member for member in members.values()}
        newer = file.version > self._had.version or signer > self._had.signer
        if newer:
            self._had = Seen(version=file.version, signer=signer)
        if newer and self._seen is not None:  # already in force, even if the disk is full
            write_seen(self._seen, self._had)


_NO_ROSTER = (
    f"It lists who may connect. Copy {ROSTER} from the authority's folder; if it is lost there, "
    "restore it from a backup with `fedcore provision restore`."
)


def _member(entry: RosterEntry, authority: x509.Certificate, *, where: str) -> Member:
    certificate = parse_certificate(entry.certificate.encode(), where=where)
    subject = subject_of(certificate, authority, where=where)
    if subject.role == "server":
        raise TrustError(
            f"{where}: this is the certificate of a server, expected a member's. The roster was "
            "not used; copy it again from the authority's folder."
        )
    return Member(
        name=subject.name,
        role=subject.role,
        public=subject.public,
        serial=subject.serial,
        not_after=subject.not_after,
        num_examples=None,
        revoked_at=None,
    )
