"""Enrolment in a project: makes a machine's key and signing request, and installs its kit.

The private key never leaves the machine; the operator answers the request with the kit. `enrol`
and `install_kit` are part of the Python API; ``fedcore client`` calls the same.
"""

from __future__ import annotations

import hmac
from dataclasses import dataclass
from datetime import UTC, datetime
from os import PathLike
from pathlib import Path

from fedcore.crypto.certificates import certificate_sha256, parse_certificate, pem
from fedcore.crypto.issue import make_request
from fedcore.crypto.keys import fingerprint, load_key, new_key, public_bytes, save_key
from fedcore.crypto.kit import (
    KEY,
    KIT,
    MAX_KIT_BYTES,
    REQUEST,
    Kit,
    VerifiedKit,
    load_identity,
    parse_kit,
    parse_kit_file,
    write_kit,
)
from fedcore.errors import CertificateRefused, ConfigError, DataError
from fedcore.files import disk_errors, name_exists, read_bytes, write_atomic

Place = str | PathLike[str]


@dataclass(frozen=True)
class Enrolled:
    """Result of `fedcore.enrol`: a signing request to send to the operator.

    Example::

        made = fedcore.enrol("kit", "edge-017")
        made.request, made.fingerprint
    """

    request: Path
    """File of the request."""
    fingerprint: str
    """SHA-256 of the public key, to compare with the output of ``fedcore provision list``."""


def enrol(kit: Place, name: str) -> Enrolled:
    """Makes this machine's key, and a request for the operator. Never replaces an existing key.

    A second call before the kit is installed makes a new request for the same key. Imports neither
    torch nor Flower.

    Example::

        made = fedcore.enrol("kit", "edge-017")  # then send made.request to the operator
        fedcore.install_kit("kit", "edge-017.kit")  # and install what comes back

    Args:
        kit: The kit's folder; created if missing.
        name: The machine's name, unique in the project.

    Raises:
        ConfigError: a kit is installed in the folder already, or the name is not valid.
        CertificateRefused: other users can read the existing key, or the file is not a key.
        DiskFull: there was no room.
    """
    folder = Path(kit)
    if name_exists(folder / KIT):
        raise ConfigError(
            f"{folder}: an identity is installed in this folder already. Nothing was written; "
            "choose another folder, or have its certificate renewed by the operator."
        )
    key = load_key(folder / KEY) if name_exists(folder / KEY) else new_key()
    request = make_request(key, name)
    with disk_errors(folder):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not name_exists(folder / KEY):
        save_key(folder / KEY, key)
    write_atomic(folder / REQUEST, request)
    return Enrolled(folder / REQUEST, fingerprint(public_bytes(key)))


def install_kit(
    kit: Place, file: Place, *, authority_sha256: str | None = None, now: datetime | None = None
) -> Kit:
    """Installs the kit that the operator sent back: the first one, or a renewed one.

    Example::

        kit = fedcore.install_kit("kit", "edge-017.kit", authority_sha256="3f9a...")
        kit.name, kit.servers, kit.not_after

    Args:
        kit: Folder in which `fedcore.enrol` made the key.
        file: The kit from the operator.
        authority_sha256: The authority's fingerprint, which the operator gives over another channel
            than the kit; unchecked when None.
        now: The current time, UTC; the system's clock when None.

    Raises:
        DataError: the kit or the key is missing.
        CertificateRefused: the kit is not in force, is for another key or role, is from another
            authority than ``authority_sha256`` or the installed kit, or is older than the
            installed kit, which stays in place.
    """
    now = now or datetime.now(UTC)
    _install(Path(kit), Path(file), authority_sha256=authority_sha256, now=now)
    return load_identity(Path(kit), now=now)


def _install(folder: Path, file: Path, *, authority_sha256: str | None, now: datetime) -> None:
    raw = read_bytes(file, max_bytes=MAX_KIT_BYTES, what="a kit")
    kit = parse_kit(raw, now=now, where=str(file))
    if not name_exists(folder / KEY):
        raise DataError(
            f"{folder}: there is no key in this folder. Nothing was installed; use the folder "
            "that `fedcore client enrol` created for this request."
        )
    if public_bytes(load_key(folder / KEY)) != kit.subject.public:
        raise CertificateRefused(
            f"{file}: this kit was issued for another key than the one in {folder}. Nothing was "
            f"installed; use the folder in which {kit.subject.name!r} enrolled, or send its "
            "request again."
        )
    if kit.subject.role == "server":
        raise CertificateRefused(
            f"{file}: this is a server's kit, expected a member's. Nothing was installed."
        )
    got = certificate_sha256(kit.authority)
    if authority_sha256 is not None and not hmac.compare_digest(got, _plain(authority_sha256)):
        raise CertificateRefused(
            f"{file}: its authority has SHA-256 {got}, expected {_plain(authority_sha256)}. "
            "Nothing was installed, because the kit does not come from the authority that you "
            "expect; ask the operator for it again."
        )
    if name_exists(folder / KIT):
        _check_successor(kit, folder, where=str(file))
    write_kit(folder, kit.file)
    with disk_errors(folder):
        (folder / REQUEST).unlink(missing_ok=True)


def _check_successor(new: VerifiedKit, folder: Path, *, where: str) -> None:
    """Checks that a kit renews the installed one, which may have expired.

    Raises:
        CertificateRefused: it has another authority or subject, or an earlier start of validity.
    """
    path = folder / KIT
    raw = read_bytes(path, max_bytes=MAX_KIT_BYTES, what="the installed kit")
    old = parse_kit_file(raw, where=str(path))
    before = parse_certificate(old.certificate.encode(), where=str(path))
    if pem(new.authority) != old.authority.encode() or new.certificate.subject != before.subject:
        raise CertificateRefused(
            f"{where}: this kit is for {new.certificate.subject.rfc4514_string()}, but {folder} "
            f"belongs to {before.subject.rfc4514_string()}, certified by another authority. "
            "Nothing was installed; enrol in another folder."
        )
    if new.certificate.not_valid_before_utc < before.not_valid_before_utc:
        raise CertificateRefused(
            f"{where}: this kit is older than the one installed in {folder}. Nothing was "
            "installed; the newer one stays."
        )


def _plain(sha256: str) -> str:
    """Normalizes a fingerprint to lower-case hex digits; OpenSSL prints capitals and colons."""
    return sha256.replace(":", "").strip().lower()
