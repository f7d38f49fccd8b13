"""Kits that an authority issues: their validity, their file, and a description of each."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from os import PathLike
from pathlib import Path

from cryptography.x509 import load_pem_x509_certificate

from fedcore.crypto.certificates import Role, certificate_sha256
from fedcore.crypto.kit import KitFile
from fedcore.errors import ConfigError
from fedcore.files import write_atomic
from server.provision.folder import check_place

MAX_DAYS = 730
Place = str | PathLike[str]


@dataclass(frozen=True)
class IssuedKit:
    """A certificate that an `Authority` has issued, and where its kit is.

    Example::

        kit = fedcore.Authority("authority").add_device("edge-017", "request.pem")
        kit.path, kit.not_after  # send the file to the device: it contains no secret
    """

    name: str
    role: Role
    servers: tuple[str, ...]
    """The server's addresses, such as ``https://fl.example.org:9092``."""
    serial: str
    """Serial number of the certificate, in hexadecimal."""
    not_after: datetime
    """When the certificate expires, UTC."""
    authority_sha256: str
    """The authority's fingerprint, which the holder compares over another channel."""
    path: Path
    """The kit's file; the folder of key and kit for a server, or a person on this machine."""


def clock() -> datetime:
    """Returns the current time, UTC, in whole seconds: the resolution of certificates and logs."""
    return datetime.now(UTC).replace(microsecond=0)


def validity(days: int) -> timedelta:
    """Returns the validity of a new certificate; raises `ConfigError` if it is not allowed."""
    if not 1 <= days <= MAX_DAYS:
        raise ConfigError(
            f"days = {days}: expected 1 to {MAX_DAYS}. Nothing was issued; shorter is safer."
        )
    return timedelta(days=days)


def free(out: Place | None, name: str) -> Path:
    """Returns the path of a new kit, by default ``NAME.kit``.

    Raises:
        ConfigError: a file exists there.
        ResourceError: no file can be created there.
    """
    path = Path(f"{name}.kit") if out is None else Path(out)
    if path.exists():
        raise ConfigError(
            f"{path}: this file exists. No certificate was issued; remove it, or choose another "
            "with --out."
        )
    check_place(path)
    return path


def written(file: KitFile, path: Path) -> IssuedKit:
    """Writes a kit for its holder."""
    write_atomic(path, file.to_bytes())
    return issued(file, path)


def issued(file: KitFile, path: Path) -> IssuedKit:
    """Describes a kit that was written to ``path``."""
    certificate = load_pem_x509_certificate(file.certificate.encode())
    _, role, name = (str(part.value) for part in certificate.subject)
    return IssuedKit(
        name=name,
        role=role,  # type: ignore[arg-type]
        servers=file.servers,
        serial=f"{certificate.serial_number:x}",
        not_after=certificate.not_valid_after_utc,
        authority_sha256=certificate_sha256(load_pem_x509_certificate(file.authority.encode())),
        path=path,
    )
