"""The authority's folder: read and changed under one lock, with an audit record of every change.

::

    authority.pem   the authority's certificate; public
    authority.key   its private key; mode 0600, encrypted if a passphrase was given
    roster.json     all members with certificates, revoked ones too; signed
    roster.key      the key that signs it, certified by the authority's key; mode 0600
    audit.jsonl     append-only, hash-chained log of certificates issued and revoked
    audit.mark      the end of that log
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
from fedcore.crypto.kit import KEY, KIT, MAX_KIT_BYTES, KitFile, parse_kit_file
from fedcore.crypto.roster import (
    MAX_ROSTER_BYTES,
    ROSTER,
    Member,
    RosterEntry,
    RosterFile,
    parse_roster,
)
from fedcore.crypto.roster_seal import Signer
from fedcore.crypto.sealing import decrypt, is_encrypted
from fedcore.errors import CertificateRefused, ConfigError, DataError, ResourceError
from fedcore.files import (
    disk_errors,
    lock_file,
    name_exists,
    read_bytes,
    remove_unfinished,
    write_atomic,
)
from server.operator_log import AUDIT, Audit
from server.operator_log import MARK as AUDIT_MARK

CERTIFICATE, PRIVATE_KEY, SERVER = "authority.pem", "authority.key", "server"
ROSTER_KEY = "roster.key"
_RESTORE = (
    "Nothing was done; restore it from a copy, or restore the whole authority from a backup with "
    "`fedcore provision restore FILE --replace`."
)
MAX_AUDIT_BYTES = 32 << 20  # 32 MiB: some 100,000 lines


@dataclass(frozen=True)
class AuthorityState:
    """The verified content of the folder, without the private key."""

    folder: Path
    project: str
    certificate: x509.Certificate
    roster: RosterFile
    members: Mapping[str, Member]
    """Members by certificate (PEM), in the order of enrolment."""

    @property
    def server(self) -> Path:
        """The folder of the server's identity; may not exist."""
        return self.folder / SERVER

    def find(self, name: str) -> tuple[RosterEntry, Member] | None:
        """Returns the entry and member of a name; None if it is revoked or unknown."""
        for entry in self.roster.members:
            member = self.members[entry.certificate]
            if member.name == name and member.revoked_at is None:
                return entry, member
        return None


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Locks the folder, and removes what a killed process left half-written; waits for a holder.

    Raises:
        DataError: there is no authority in this folder.
    """
    _check_there(folder)
    with lock_file(folder / ".lock"):
        remove_unfinished(folder, CERTIFICATE, PRIVATE_KEY, ROSTER, ROSTER_KEY, AUDIT_MARK)
        remove_unfinished(folder / SERVER, KEY, KIT)  # the other files are the running server's
        yield


def read_authority(folder: Path, *, now: datetime, unsigned: bool = False) -> AuthorityState:
    """Reads and verifies the authority's certificate and roster.

    Args:
        folder: The authority's folder.
        now: The current time, UTC.
        unsigned: Whether to accept an unsigned roster, in order to sign it.

    Raises:
        DataError: a file is missing or unreadable.
        CertificateRefused: the authority's own certificate has expired or is invalid.
        TrustError: the roster's signature doesn't verify.
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
    return AuthorityState(folder, project, certificate, roster, members)


def key_is_sealed(folder: Path) -> bool:
    """Returns whether the authority's key is encrypted; raises `DataError` if it is missing."""
    _check_there(folder)
    return is_encrypted(_raw_key(folder))


def read_key(authority: AuthorityState, passphrase: str | None) -> EllipticCurvePrivateKey:
    """Reads and decrypts the authority's private key.

    Raises:
        DataError: it is missing or unreadable.
        ConfigError: the key is encrypted, and no passphrase was given.
        TrustError: the passphrase is wrong.
        CertificateRefused: the file isn't a key, or doesn't match the authority's certificate.
    """
    path, raw = authority.folder / PRIVATE_KEY, _raw_key(authority.folder)
    if is_encrypted(raw):
        if passphrase is None:
            raise ConfigError(
                f"{path}: this key is encrypted with a passphrase, but none was given. Nothing "
                "was signed; pass a file with --passphrase-file, set FEDCORE_PASSPHRASE, or in "
                "Python pass passphrase=."
            )
        raw = decrypt(raw, passphrase, where=str(path))
    key = parse_key(raw, where=str(path))
    check_pair(key, authority.certificate, where=str(path))
    return key


def check_pair(key: EllipticCurvePrivateKey, certificate: x509.Certificate, *, where: str) -> None:
    """Raises `CertificateRefused` unless the key belongs to the certificate."""
    if key.public_key() != certificate.public_key():
        raise CertificateRefused(
            f"{where}: this key does not match the authority's certificate. Nothing was signed; "
            "restore both from one backup."
        )


def check_place(path: Path) -> None:
    """Checks that a file and its parent folders can be created at ``path``; leaves nothing behind.

    Certification takes a name permanently, so this is checked first.

    Raises:
        ResourceError: the file can't be created, or the disk is full.
    """
    there = next(one for one in path.absolute().parents if one.exists())
    try:
        with tempfile.NamedTemporaryFile(dir=there, prefix=f".{path.name}."):
            pass
    except OSError as error:
        raise ResourceError(
            f"{path}: cannot create this file ({error.strerror or error}). No certificate was "
            "issued or recorded; choose another place, or make this one writable."
        ) from None


def read_roster_key(authority: AuthorityState) -> tuple[EllipticCurvePrivateKey, Signer]:
    """Reads the key that signs the current roster, and the authority's certification of it.

    Raises:
        DataError: the key is missing or unreadable.
        CertificateRefused: others may read the file, or it is another key.
    """
    path, signer = authority.folder / ROSTER_KEY, authority.roster.signer
    if not name_exists(path) or signer is None:
        raise DataError(
            f"{path}: the key that signs the roster is missing. Nothing was changed; create "
            "another with `fedcore provision sign`, which the authority's own key certifies."
        )
    key = load_key(path)
    if public_bytes(key).decode() != signer.public:
        raise CertificateRefused(
            f"{path}: this is not the key that signed the current roster. Nothing was changed; "
            "restore the right one, or create another with `fedcore provision sign`."
        )
    return key, signer


def write_roster(authority: AuthorityState, members: tuple[RosterEntry, ...]) -> None:
    """Writes and signs a changed list of members, atomically.

    Raises:
        ConfigError: the roster would exceed what a server reads. Nothing was written.
        DataError: the roster's key is missing or unreadable.
        CertificateRefused: others may read the roster's key, or it is another key.
    """
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
    """Appends one line to the audit log and flushes it to disk before returning.

    The line is written before the action, so that nothing is issued unrecorded. If the action fails
    afterwards, the extra line is harmless.

    Raises:
        DataError: the log isn't a regular file, or was truncated since its last write.
        DiskFull: the disk is full.
    """
    with closing(Audit(folder / AUDIT, clock=lambda: at)) as log:
        log.record(by=by, action=action, **more)


def link_roster(server: Path) -> None:
    """Links the authority's roster into the server's folder; a server elsewhere needs a copy."""
    with disk_errors(server):
        server.mkdir(mode=0o700, exist_ok=True)
        server.chmod(0o700)
        if not (server / ROSTER).is_symlink():
            (server / ROSTER).symlink_to(Path("..") / ROSTER)


def server_kit(authority: AuthorityState) -> KitFile:
    """Reads the server's kit.

    Raises:
        ConfigError: there is no server yet.
        CertificateRefused: the file is no kit.
    """
    path = authority.server / KIT
    if not name_exists(path):
        raise ConfigError(
            f"{authority.folder}: there is no server yet, but a kit contains its address. No "
            "certificate was issued; run `fedcore provision server HOST` first."
        )
    raw = read_bytes(
        path,
        max_bytes=MAX_KIT_BYTES,
        what="the server's kit",
        otherwise="Nothing was done; `fedcore provision server HOST --replace` creates it again.",
    )
    return parse_kit_file(raw, where=str(path))


def _check_there(folder: Path) -> None:
    if not name_exists(folder / CERTIFICATE):
        raise DataError(
            f"{folder}: there is no authority in this folder. Nothing was changed; create one "
            "with `fedcore provision init`, or pass its folder with --authority."
        )


def _raw_key(folder: Path) -> bytes:
    return read_bytes(
        folder / PRIVATE_KEY,
        max_bytes=MAX_KEY_BYTES,
        what="the authority's key",
        otherwise=_RESTORE,
    )
