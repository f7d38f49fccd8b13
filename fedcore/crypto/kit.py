"""The files of an identity on its own machine: its key, and the kit from the operator.

::

    key.pem        the private key, made here; mode 0600
    request.pem    the signing request over it, for the operator
    kit.json       certificate, authority and addresses of the server; contains no secret

A kit is written atomically, so a folder never contains parts of two kits.
"""

from __future__ import annotations

import os
import ssl
import tempfile
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal

from cryptography import x509
from pydantic import Field, ValidationError

from fedcore.config.patterns import ADDRESS
from fedcore.config.section import Section
from fedcore.crypto.certificates import (
    MAX_CERTIFICATE_BYTES,
    Role,
    Subject,
    certificate_sha256,
    check_authority,
    check_certificate,
    parse_certificate,
    pem,
)
from fedcore.crypto.keys import MAX_KEY_BYTES, load_key, public_bytes
from fedcore.errors import CertificateRefused, DataError
from fedcore.files import (
    ABANDONED_S,
    disk_errors,
    name_exists,
    open_regular,
    read_bytes,
    remove_unfinished,
    write_atomic,
)
from fedcore.observability.faults import first_fault

KEY, REQUEST, KIT = "key.pem", "request.pem", "kit.json"
MAX_KIT_BYTES = 4 * MAX_CERTIFICATE_BYTES  # two certificates and up to 30 addresses

Pem = Annotated[str, Field(max_length=MAX_CERTIFICATE_BYTES)]
Address = Annotated[str, Field(pattern=ADDRESS)]


class KitFile(Section):
    """``kit.json``; the holder's name and role are only in the certificate."""

    format: Literal["fedcore.kit/1"] = "fedcore.kit/1"
    servers: Annotated[tuple[Address, ...], Field(min_length=1, max_length=30)]
    certificate: Pem
    authority: Pem

    def to_bytes(self) -> bytes:
        """Returns the file's content."""
        return (self.model_dump_json(indent=2) + "\n").encode()


@dataclass(frozen=True)
class VerifiedKit:
    """A kit whose certificate has been checked against its authority."""

    file: KitFile
    subject: Subject
    certificate: x509.Certificate
    authority: x509.Certificate


@dataclass(frozen=True)
class Kit:
    """An identity that can connect: key and certificate match, and the certificate is in force.

    Example::

        kit = fedcore.install_kit("kit", "edge-017.kit")
        kit.project, kit.name, kit.role, kit.not_after
    """

    folder: Path
    project: str
    name: str
    role: Role
    servers: tuple[str, ...]
    """The server's addresses, such as ``https://fl.example.org:9092``, in order of use."""
    key_path: Path
    certificate_pem: bytes = field(repr=False)
    authority_pem: bytes = field(repr=False)
    public: bytes = field(repr=False)
    """Public key in PEM, from `fedcore.crypto.keys.public_bytes`: the node's identity."""
    not_after: datetime
    """When the certificate expires, UTC."""

    @property
    def authority_sha256(self) -> str:
        """The authority's fingerprint, to compare with the operator's over another channel."""
        return certificate_sha256(parse_certificate(self.authority_pem, where=str(self.folder)))

    def key_pem(self) -> bytes:
        """Returns the content of the private key's file, in PEM.

        Raises:
            DataError: the file is missing or not a regular file.
        """
        return read_bytes(self.key_path, max_bytes=MAX_KEY_BYTES, what="a private key")


def parse_kit_file(raw: bytes, *, where: str) -> KitFile:
    """Parses a kit without checking its certificates.

    Raises:
        CertificateRefused: the bytes are no kit.
    """
    try:
        return KitFile.model_validate_json(raw)
    except ValidationError as error:
        raise CertificateRefused(
            f"{where}: {first_fault(error)}. This is not a kit of a known format and was not "
            "used; ask the operator for it again."
        ) from None


def parse_kit(raw: bytes, *, now: datetime, where: str) -> VerifiedKit:
    """Parses a kit and checks its certificate against its authority.

    A kit cannot prove that its authority is the right one: the person who installs it compares the
    authority's fingerprint, or trusts the channel of delivery.

    Raises:
        CertificateRefused: the bytes are no kit, or its certificate is not in force.
    """
    file = parse_kit_file(raw, where=where)
    authority = parse_certificate(file.authority.encode(), where=f"{where}: authority")
    certificate = parse_certificate(file.certificate.encode(), where=f"{where}: certificate")
    check_authority(authority, now=now, where=f"{where}: authority")
    subject = check_certificate(certificate, authority, now=now, where=f"{where}: certificate")
    return VerifiedKit(file, subject, certificate, authority)


def read_kit(path: Path, *, now: datetime) -> VerifiedKit:
    """Reads a kit and checks its certificate against its authority, see `parse_kit`.

    Raises:
        DataError: the file is missing or unreadable.
        CertificateRefused: it is no kit, or its certificate is not in force.
    """
    raw = read_bytes(path, max_bytes=MAX_KIT_BYTES, what="a kit", otherwise=_NO_KIT)
    return parse_kit(raw, now=now, where=str(path))


_NO_KIT = (
    "It identifies this machine. A member's kit is installed by `fedcore client install` from "
    "the file that the operator sent; a server's is created by `fedcore provision server` or "
    "restored by `fedcore provision restore`."
)


def load_identity(folder: Path, *, now: datetime | None = None) -> Kit:
    """Reads the identity in a folder, of any role.

    Args:
        folder: Contains ``key.pem`` and ``kit.json``.
        now: UTC; the system's clock when unset.

    Raises:
        DataError: a file is missing or unreadable.
        CertificateRefused: other users may read the key, it does not match the certificate, or
            `parse_kit` rejects the kit.
    """
    key_path, kit_path = folder / KEY, folder / KIT
    if not name_exists(kit_path):
        raise DataError(
            f"{folder}: no kit is installed in this folder. Nothing was started; create a "
            "request for the operator with `fedcore client enrol`, and install the kit that "
            "comes back with `fedcore client install`."
        )
    certified = read_kit(kit_path, now=now or datetime.now(UTC))
    key = load_key(key_path)
    if public_bytes(key) != certified.subject.public:
        raise CertificateRefused(
            f"{folder}: {KEY} does not match the certificate of {certified.subject.name!r} in "
            f"{KIT}. Nothing was started; restore the key that this kit was issued for, or enrol "
            "again."
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
    """Reads the identity of a device, an operator or a viewer.

    Raises:
        DataError: a file is missing or unreadable.
        CertificateRefused: `load_identity` rejects it, or the identity is a server's.
    """
    kit = load_identity(folder, now=now)
    if kit.role == "server":
        raise CertificateRefused(
            f"{folder}: this is a server's identity, expected that of a device, an operator or a "
            "viewer. Nothing was started; use the folder created by `fedcore client enrol`."
        )
    return kit


def write_kit(folder: Path, file: KitFile) -> None:
    """Installs a kit in a folder, atomically, in place of the previous one."""
    remove_unfinished(folder, KIT, idle_s=ABANDONED_S)
    write_atomic(folder / KIT, file.to_bytes())


def client_context(kit: Kit) -> ssl.SSLContext:
    """Returns TLS settings for the project's server: version 1.3, mutual authentication.

    Guarantee:
        The connection succeeds only if the kit's authority issued the server's certificate, for a
        server and for the requested address; the system's authorities are not trusted.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    return restrict(context, kit)


def restrict(context: ssl.SSLContext, kit: Kit) -> ssl.SSLContext:
    """Applies the settings of both sides: TLS 1.3, this authority only, this identity."""
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_mode = ssl.CERT_REQUIRED
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    context.load_verify_locations(cadata=kit.authority_pem.decode())
    # `load_cert_chain` accepts only paths. A certificate is no secret; the key stays in its file.
    with tempfile.NamedTemporaryFile(suffix=".pem") as stream:
        with disk_errors(Path(stream.name)):
            stream.write(kit.certificate_pem)
            stream.flush()
        os.close(open_regular(kit.key_path, what="a private key"))  # OpenSSL would block on a pipe
        context.load_cert_chain(stream.name, kit.key_path)
    return context
