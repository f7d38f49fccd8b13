"""The authority's folder: read and changed under one lock, with a record of every change.

::

    authority.pem   the authority's certificate; public
    authority.key   its private key; mode 0600, sealed when a passphrase was given
    roster.json     everyone with a certificate, signed; what a server reads
    roster.key      the key that signs it, which the authority's key vouches for; mode 0600
    audit.jsonl     who issued or revoked what, and when; only ever appended to, each line chained
    audit.mark      how far that log went
    server/         the server's identity: key.pem, kit.json, and roster.json, a link to the above
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey

from fedcore.crypto.certificates import MAX_CERTIFICATE_BYTES, check_authority, parse_certificate
from fedcore.crypto.keys import MAX_KEY_BYTES, load_key, parse_key, public_bytes
from fedcore.crypto.roster import (
    MAX_ROSTER_BYTES,
    ROSTER,
    Member,
    RosterEntry,
    RosterFile,
    parse_roster,
)
from fedcore.crypto.roster_seal import Signer
from fedcore.crypto.sealing import is_sealed, unseal
from fedcore.errors import CertificateRefused, ConfigError, DataError, ResourceError
from fedcore.files import disk_errors, is_there, lock_file, read_bytes, write_atomic
from server.audit import AUDIT, Audit

CERTIFICATE, PRIVATE_KEY, SERVER = "authority.pem", "authority.key", "server"
ROSTER_KEY = "roster.key"
_RESTORE = (
    "Nothing was done; put it back from a copy, or `fedcore provision restore FILE --replace` "
    "brings back the whole authority from a backup."
)
MAX_AUDIT_BYTES = 32 << 20  # 32 MiB: some 100,000 lines


@dataclass(frozen=True)
class Authority:
    """What stands in the folder, verified; the private key stays where it is."""

    folder: Path
    project: str
    certificate: x509.Certificate
    roster: RosterFile
    members: Mapping[str, Member]
    """By certificate (PEM), in the order of enrolment."""

    @property
    def server(self) -> Path:
        """The folder of the server's identity, whether or not it is there."""
        return self.folder / SERVER

    def find(self, name: str) -> tuple[RosterEntry, Member] | None:
        """The entry and member of a name, unless it is revoked or unknown."""
        for entry in self.roster.members:
            member = self.members[entry.certificate]
            if member.name == name and member.revoked_at is None:
                return entry, member
        return None


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds the folder's lock, waiting for whoever has it.

    Raises:
        DataError: there is no authority in this folder.
    """
    _check_there(folder)
    with lock_file(folder / ".lock"):
        yield


def read_authority(folder: Path, *, now: datetime, unsigned: bool = False) -> Authority:
    """Reads what is in force.

    Args:
        folder: The authority's.
        now: The time, UTC.
        unsigned: Whether a roster that carries no signature will do, to be signed.

    Raises:
        DataError: a file is missing or unreadable.
        CertificateRefused: the authority's own certificate has expired, or is none.
        TrustError: the roster does not verify.
    """
    path = folder / CERTIFICATE
    raw = read_bytes(
        path,
        max_bytes=MAX_CERTIFICATE_BYTES,
        what="the authority's certificate",
        otherwise=_RESTORE,
    )
    certificate = parse_certificate(raw, where=str(path))
    project = check_authority(certificate, now=now, where=str(path))
    raw = read_bytes(
        folder / ROSTER, max_bytes=MAX_ROSTER_BYTES, what="the roster", otherwise=_RESTORE
    )
    roster, members = parse_roster(raw, certificate, where=str(folder / ROSTER), unsigned=unsigned)
    return Authority(folder, project, certificate, roster, members)


def key_is_sealed(folder: Path) -> bool:
    """Whether the authority's key needs a passphrase; raises `DataError` when there is none."""
    _check_there(folder)
    return is_sealed(_raw_key(folder))


def read_key(authority: Authority, passphrase: str | None) -> EllipticCurvePrivateKey:
    """The authority's private key.

    Raises:
        DataError: it is missing or unreadable.
        ConfigError: it is sealed, and no passphrase was given.
        TrustError: the passphrase is another.
        CertificateRefused: it is no key, or not the one of the authority's certificate.
    """
    path, raw = authority.folder / PRIVATE_KEY, _raw_key(authority.folder)
    if is_sealed(raw):
        if passphrase is None:
            raise ConfigError(
                f"{path}: this key is sealed with a passphrase, and none was given. Nothing was "
                "signed; name a file with --passphrase-file, or set FEDCORE_PASSPHRASE."
            )
        raw = unseal(raw, passphrase, where=str(path))
    key = parse_key(raw, where=str(path))
    check_pair(key, authority.certificate, where=str(path))
    return key


def check_pair(key: EllipticCurvePrivateKey, certificate: x509.Certificate, *, where: str) -> None:
    """Raises `CertificateRefused` unless the key is the certificate's."""
    if key.public_key() != certificate.public_key():
        raise CertificateRefused(
            f"{where}: this is not the key of the authority's certificate. Nothing was signed; "
            "restore both from one backup."
        )


def check_place(path: Path) -> None:
    """Sees that a file can be made at ``path``, folders above it included; leaves nothing there.

    Whoever is certified has a name that is taken from then on, so that is seen before.

    Raises:
        ResourceError: it cannot, or the disk is full.
    """
    there = next(one for one in path.absolute().parents if one.exists())
    try:
        with tempfile.NamedTemporaryFile(dir=there, prefix=f".{path.name}."):
            pass
    except OSError as error:
        raise ResourceError(
            f"{path}: this file cannot be made ({error.strerror or error}). No certificate was "
            "issued, and nothing recorded; name another place, or make this one writable."
        ) from None


def read_roster_key(authority: Authority) -> tuple[EllipticCurvePrivateKey, Signer]:
    """The key that signs the roster in force, and the authority's word for it.

    Raises:
        DataError: it is missing or unreadable.
        CertificateRefused: others may read it, or it is another one.
    """
    path, signer = authority.folder / ROSTER_KEY, authority.roster.signer
    if not is_there(path) or signer is None:
        raise DataError(
            f"{path}: the key that signs the roster is missing. Nothing was changed; `fedcore "
            "provision sign` makes another, which the authority's own key vouches for."
        )
    key = load_key(path)
    if public_bytes(key).decode() != signer.public:
        raise CertificateRefused(
            f"{path}: this is not the key that signed the roster in force. Nothing was changed; "
            "put the right one back, or make another by `fedcore provision sign`."
        )
    return key, signer


def write_roster(authority: Authority, members: tuple[RosterEntry, ...]) -> None:
    """Puts a changed list of members into force, atomically."""
    key, signer = read_roster_key(authority)
    roster = RosterFile(version=authority.roster.version + 1, members=members).signed(key, signer)
    raw = roster.to_bytes()
    if len(raw) > MAX_ROSTER_BYTES:
        raise ConfigError(
            f"{authority.folder}: the roster would have {len(raw)} bytes, more than the "
            f"{MAX_ROSTER_BYTES} that a server reads. Nobody was added; start another project."
        )
    write_atomic(authority.folder / ROSTER, raw)


def record(folder: Path, *, at: datetime, by: str, action: str, **more: object) -> None:
    """Appends one line to the audit log, on disk before this returns.

    It is written before what it tells of, so that nothing is issued unrecorded; a line whose act
    failed afterwards is possible, and harmless.

    Raises:
        DataError: the log is no file, or was cut since it was last written to.
        DiskFull: there is no room.
    """
    with closing(Audit(folder / AUDIT, clock=lambda: at)) as log:
        log.record(by=by, action=action, **more)


def link_roster(server: Path) -> None:
    """Lets the server's folder show the authority's roster; elsewhere, a copy takes its place."""
    with disk_errors(server):
        server.mkdir(mode=0o700, exist_ok=True)
        server.chmod(0o700)
        if not (server / ROSTER).is_symlink():
            (server / ROSTER).symlink_to(Path("..") / ROSTER)


def _check_there(folder: Path) -> None:
    if not is_there(folder / CERTIFICATE):
        raise DataError(
            f"{folder}: there is no authority in this folder. Nothing was changed; `fedcore "
            "provision init` makes one, or name its folder with --authority."
        )


def _raw_key(folder: Path) -> bytes:
    return read_bytes(
        folder / PRIVATE_KEY,
        max_bytes=MAX_KEY_BYTES,
        what="the authority's key",
        otherwise=_RESTORE,
    )
