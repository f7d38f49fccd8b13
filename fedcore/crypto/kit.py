"""What an identity keeps on its own machine: its key, and the kit that its operator sent back.

::

    key.pem        the private key, made here; mode 0600
    request.pem    the signing request over it, for the operator
    kit.json       certificate, authority and addresses of the server; holds no secret

A kit file is written whole, so a folder has one kit or the next, never parts of two.
"""

from __future__ import annotations

import os
import ssl
import tempfile
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal

from cryptography import x509
from pydantic import Field, ValidationError

from fedcore.config.patterns import ADDRESS
from fedcore.config.run import Section
from fedcore.crypto.certificates import (
    MAX_CERTIFICATE_BYTES,
    Role,
    Subject,
    check_authority,
    check_certificate,
    parse_certificate,
    pem,
)
from fedcore.crypto.keys import MAX_KEY_BYTES, load_key, public_bytes
from fedcore.errors import CertificateRefused, DataError
from fedcore.files import disk_errors, is_there, open_regular, read_bytes, write_atomic
from fedcore.observability.faults import first_fault

KEY, REQUEST, KIT = "key.pem", "request.pem", "kit.json"
MAX_KIT_BYTES = 4 * MAX_CERTIFICATE_BYTES  # two certificates and up to 30 addresses

Pem = Annotated[str, Field(max_length=MAX_CERTIFICATE_BYTES)]
Address = Annotated[str, Field(pattern=ADDRESS)]


class KitFile(Section):
    """``kit.json``: who its holder is stands in the certificate alone."""

    format: Literal["fedcore.kit/1"] = "fedcore.kit/1"
    servers: Annotated[tuple[Address, ...], Field(min_length=1, max_length=30)]
    certificate: Pem
    authority: Pem

    def to_bytes(self) -> bytes:
        """The file's content."""
        return (self.model_dump_json(indent=2) + "\n").encode()


@dataclass(frozen=True)
class Certified:
    """What a kit says, once its certificate has been checked against its authority."""

    file: KitFile
    subject: Subject
    certificate: x509.Certificate
    authority: x509.Certificate


@dataclass(frozen=True)
class Kit:
    """An identity that can connect: its key and certificate belong together and are in force."""

    folder: Path
    project: str
    name: str
    role: Role
    servers: tuple[str, ...]
    """Where the project's server listens, as ``https://fl.example.org:9092``; the first first."""
    key_path: Path
    certificate_pem: bytes
    authority_pem: bytes
    public: bytes
    """The key, as `fedcore.crypto.keys.public_bytes` gives it: the node's identity."""
    not_after: datetime
    """When the certificate expires, UTC."""

    def key_pem(self) -> bytes:
        """The private key's file, as TLS libraries read it.

        Raises:
            DataError: it is not there any more, or no file.
        """
        return read_bytes(self.key_path, max_bytes=MAX_KEY_BYTES, what="a private key")


def parse_kit_file(raw: bytes, *, where: str) -> KitFile:
    """Reads a kit without looking into its certificates.

    Raises:
        CertificateRefused: it is no kit.
    """
    try:
        return KitFile.model_validate_json(raw)
    except ValidationError as error:
        raise CertificateRefused(
            f"{where}: {first_fault(error)}. This is no kit of a known format, and was not used; "
            "get it again from the operator."
        ) from None


def parse_kit(raw: bytes, *, now: datetime, where: str) -> Certified:
    """Reads a kit and checks its certificate against its own authority.

    That the authority is the right one, nothing in a kit can prove: whoever installs it compares
    the authority's fingerprint, or trusts the channel on which the kit came.

    Raises:
        CertificateRefused: it is no kit, or its certificate is not in force.
    """
    file = parse_kit_file(raw, where=where)
    authority = parse_certificate(file.authority.encode(), where=f"{where}: authority")
    certificate = parse_certificate(file.certificate.encode(), where=f"{where}: certificate")
    check_authority(authority, now=now, where=f"{where}: authority")
    subject = check_certificate(certificate, authority, now=now, where=f"{where}: certificate")
    return Certified(file, subject, certificate, authority)


def read_kit(path: Path, *, now: datetime) -> Certified:
    """As `parse_kit`, from a file; raises `DataError`, too, when there is none."""
    raw = read_bytes(path, max_bytes=MAX_KIT_BYTES, what="a kit", otherwise=_NO_KIT)
    return parse_kit(raw, now=now, where=str(path))


_NO_KIT = (
    "It says who this is. A member's is made by `fedcore client install`, from what the operator "
    "sent; a server's by `fedcore provision server`, or `fedcore provision restore`."
)


def load_identity(folder: Path, *, now: datetime | None = None) -> Kit:
    """The identity in a folder, whatever its role.

    Args:
        folder: With ``key.pem`` and ``kit.json``.
        now: UTC; the system's clock when unset.

    Raises:
        DataError: something is missing or unreadable.
        CertificateRefused: the key is open to others, is not the certificate's, or the kit is
            refused (see `parse_kit`).
    """
    key_path, kit_path = folder / KEY, folder / KIT
    if not is_there(kit_path):
        raise DataError(
            f"{folder}: no kit is installed in this folder. Nothing was started; `fedcore client "
            "enrol` makes a request for the operator, and `fedcore client install` takes the kit "
            "that comes back."
        )
    certified = read_kit(kit_path, now=now or datetime.now(UTC))
    key = load_key(key_path)
    if public_bytes(key) != certified.subject.public:
        raise CertificateRefused(
            f"{folder}: {KEY} is not the key that the certificate of {certified.subject.name!r} in "
            f"{KIT} speaks of. Nothing was started; put the key back that this kit was made for, "
            "or enrol again."
        )
    return Kit(
        folder=folder,
        project=certified.subject.project,
        name=certified.subject.name,
        role=certified.subject.role,
        servers=certified.file.servers,
        key_path=key_path,
        certificate_pem=pem(certified.certificate),
        authority_pem=pem(certified.authority),
        public=certified.subject.public,
        not_after=certified.subject.not_after,
    )


def load_kit(folder: Path, *, now: datetime | None = None) -> Kit:
    """The identity of a device, an operator or a viewer.

    Raises:
        DataError: as `load_identity`.
        CertificateRefused: as `load_identity`, or the identity is a server's.
    """
    kit = load_identity(folder, now=now)
    if kit.role == "server":
        raise CertificateRefused(
            f"{folder}: this is the identity of a server, expected that of a device, an operator "
            "or a viewer. Nothing was started; name the folder that `fedcore client enrol` made."
        )
    return kit


def write_kit(folder: Path, file: KitFile) -> None:
    """Puts a kit into force in a folder, in place of the one before, atomically."""
    write_atomic(folder / KIT, file.to_bytes())


def client_context(kit: Kit) -> ssl.SSLContext:
    """TLS to the project's server: version 1.3, both sides authenticated, the name checked.

    Guarantee:
        Only a server whose certificate the kit's authority issued for the address that was asked
        for, and for servers, is talked to; the system's own authorities count for nothing.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    return restrict(context, kit)


def restrict(context: ssl.SSLContext, kit: Kit) -> ssl.SSLContext:
    """Sets what both sides hold to: TLS 1.3, this authority alone, this identity shown."""
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_mode = ssl.CERT_REQUIRED
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    context.load_verify_locations(cadata=kit.authority_pem.decode())
    # `load_cert_chain` takes paths alone. A certificate is no secret; the key stays where it is.
    with tempfile.NamedTemporaryFile(suffix=".pem") as stream:
        with disk_errors(Path(stream.name)):
            stream.write(kit.certificate_pem)
            stream.flush()
        os.close(open_regular(kit.key_path, what="a private key"))  # OpenSSL would wait for a pipe
        context.load_cert_chain(stream.name, kit.key_path)
    return context
