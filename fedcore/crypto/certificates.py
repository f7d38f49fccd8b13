"""Certificates of a project: parsing and checking those of its authority, server and members.

The authority signs every certificate directly, without a chain. A certificate contains a name
(common name), a role (organisational unit) and a project (organisation). The authority assigns the
role; of a signing request it uses only the key.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Literal, get_args

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import SECP384R1, EllipticCurvePublicKey
from cryptography.hazmat.primitives.hashes import SHA256, SHA384
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedcore.crypto.keys import public_bytes
from fedcore.errors import CertificateRefused, ConfigError

MemberRole = Literal["device", "operator", "viewer"]
Role = Literal["server", "device", "operator", "viewer"]

SKEW = timedelta(minutes=10)
"""Tolerated clock error: certificates are accepted this long before and after their validity."""

MAX_CERTIFICATE_BYTES = 8192  # bytes: one with 30 host names, as PEM, has about 2000
_ROLES: tuple[Role, ...] = get_args(Role)
_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")
UNREADABLE = (  # exceptions of `cryptography` for malformed bytes
    ValueError,
    TypeError,
    InvalidSignature,
    UnsupportedAlgorithm,
    x509.DuplicateExtension,
    x509.ExtensionNotFound,
    x509.UnsupportedGeneralNameType,
    x509.InvalidVersion,
)


@dataclass(frozen=True)
class Subject:
    """The holder of a certificate that `subject_of` has accepted."""

    project: str
    name: str
    role: Role
    public: bytes
    """Public key in PEM, from `fedcore.crypto.keys.public_bytes`."""
    serial: str
    """The serial number, in hexadecimal."""
    not_after: datetime
    """The end of validity, UTC."""


def check_name(name: str, what: str = "name") -> str:
    """Returns the name; raises `ConfigError` unless it is valid in a certificate and in a path."""
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"{what} {name!r}: expected 1 to 64 of a-z, 0-9, '-' and '_', starting with a letter "
            "or digit. Nothing was written; choose another."
        )
    return name


def parse_certificate(raw: bytes, *, where: str) -> x509.Certificate:
    """Returns the one certificate in PEM bytes; raises `CertificateRefused` for other bytes."""
    try:
        if len(raw) <= MAX_CERTIFICATE_BYTES and raw.count(b"-----BEGIN") == 1:
            return x509.load_pem_x509_certificate(raw)
    except UNREADABLE:
        pass
    raise CertificateRefused(
        f"{where}: expected one certificate (PEM), found something else. It was not used; ask "
        "the operator for the file again."
    )


def pem(certificate: x509.Certificate) -> bytes:
    """Returns a certificate as PEM."""
    return certificate.public_bytes(Encoding.PEM)


def certificate_sha256(certificate: x509.Certificate) -> str:
    """Returns a certificate's fingerprint, that of ``openssl x509 -fingerprint -sha256``.

    The format is lower-case hexadecimal, without colons.
    """
    return certificate.fingerprint(SHA256()).hex()


def check_authority(certificate: x509.Certificate, *, now: datetime, where: str) -> str:
    """Checks an authority's certificate and returns its project.

    Raises:
        CertificateRefused: it is no authority of this format, or is not valid at ``now``.
    """
    try:
        constraints = certificate.extensions.get_extension_for_class(x509.BasicConstraints)
        usage = certificate.extensions.get_extension_for_class(x509.KeyUsage)
        certificate.verify_directly_issued_by(certificate)
        project = single_attribute(certificate.subject, NameOID.ORGANIZATION_NAME)
        sound = (
            constraints.critical
            and constraints.value == x509.BasicConstraints(ca=True, path_length=0)
            and usage.value == key_usage(signs_certificates=True)
            and _is_p384(certificate)
            and _NAME.fullmatch(project) is not None
        )
    except UNREADABLE:
        sound = False
    if not sound:
        raise CertificateRefused(
            f"{where}: expected the certificate of a project's authority, found something else. "
            "It was not trusted; get the file again from the operator."
        )
    _check_time(certificate, now=now, where=where, remedy="create a new authority and enrol again")
    return project


def subject_of(
    certificate: x509.Certificate, authority: x509.Certificate, *, where: str
) -> Subject:
    """Returns the holder of a certificate that the authority issued, expired or not.

    Guarantee:
        The authority's key signed it (ECDSA on P-384, SHA-384); it is no authority itself; it
        is for a server or for a client, according to its role, and never for both.

    Args:
        certificate: The certificate to check.
        authority: A certificate that the caller trusts and `check_authority` accepts.
        where: The name of the certificate in errors.

    Raises:
        CertificateRefused: it is another authority's, altered, or not of this form.
    """
    try:
        certificate.verify_directly_issued_by(authority)
    except UNREADABLE:
        raise CertificateRefused(
            f"{where}: this certificate was not issued by the authority trusted here "
            f"({authority.subject.rfc4514_string()}). It was refused; use the kit from this "
            "project's operator."
        ) from None
    try:
        subject = _subject(certificate)
        sound = _is_p384(certificate) and subject.project == single_attribute(
            authority.subject, NameOID.ORGANIZATION_NAME
        )
    except UNREADABLE:
        sound = False
    if not sound:
        raise CertificateRefused(
            f"{where}: this certificate does not have the form that `fedcore provision` issues "
            "(one name, one known role, its key usage, a P-384 key). It was refused; ask the "
            "operator for one."
        )
    return subject


def check_certificate(
    certificate: x509.Certificate, authority: x509.Certificate, *, now: datetime, where: str
) -> Subject:
    """Returns the holder of a certificate of the authority that is valid at ``now`` (UTC).

    Allows for a clock error of `SKEW`. `subject_of` lists the other checks.

    Raises:
        CertificateRefused: `subject_of` rejects it, or it has expired or is not valid yet.
    """
    subject = subject_of(certificate, authority, where=where)
    remedy = "renew it with `fedcore provision renew`"
    _check_time(certificate, now=now, where=where, remedy=remedy)
    return subject


def peer_public(der: bytes) -> bytes:
    """Returns the key of a TLS peer in PEM, see `fedcore.crypto.keys.public_bytes`.

    Args:
        der: The result of ``ssl_object.getpeercert(binary_form=True)``: TLS has verified that the
            authority signed it and that the peer has its private key.

    Raises:
        CertificateRefused: it is no certificate, or its key is not on P-384.
    """
    try:
        public = x509.load_der_x509_certificate(der).public_key()
    except UNREADABLE:
        public = None
    if not isinstance(public, EllipticCurvePublicKey) or not isinstance(public.curve, SECP384R1):
        raise CertificateRefused(
            "peer certificate: expected a P-384 key, found something else. The connection was "
            "refused; use a kit from this project's operator."
        )
    return public_bytes(public)


def key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    """Returns the key usage: an authority signs only certificates, other holders all else."""
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def extended_key_usage(role: Role) -> x509.ExtendedKeyUsage:
    """Returns the usage for a role, so that a device cannot pose as a server, or vice versa."""
    server, client = ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH
    return x509.ExtendedKeyUsage([server if role == "server" else client])


def _subject(certificate: x509.Certificate) -> Subject:
    """Parses a certificate's holder; raises one of `UNREADABLE` for a form that is not issued."""
    extensions = certificate.extensions
    constraints = extensions.get_extension_for_class(x509.BasicConstraints).value
    usage = extensions.get_extension_for_class(x509.KeyUsage).value
    extended = extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    name = single_attribute(certificate.subject, NameOID.COMMON_NAME)
    said = single_attribute(certificate.subject, NameOID.ORGANIZATIONAL_UNIT_NAME)
    role = next((role for role in _ROLES if role == said), None)
    if role is None or constraints.ca or usage != key_usage(signs_certificates=False):
        raise ValueError("role, constraints or key usage")
    if extended != extended_key_usage(role) or not _NAME.fullmatch(name):
        raise ValueError("extended key usage or name")
    public = certificate.public_key()
    if not isinstance(public, EllipticCurvePublicKey):
        raise TypeError("key")
    return Subject(
        project=single_attribute(certificate.subject, NameOID.ORGANIZATION_NAME),
        name=name,
        role=role,
        public=public_bytes(public),
        serial=f"{certificate.serial_number:x}",
        not_after=certificate.not_valid_after_utc,
    )


def _is_p384(certificate: x509.Certificate) -> bool:
    public = certificate.public_key()
    return (
        isinstance(public, EllipticCurvePublicKey)
        and isinstance(public.curve, SECP384R1)
        and isinstance(certificate.signature_hash_algorithm, SHA384)
    )


def single_attribute(name: x509.Name, kind: x509.ObjectIdentifier) -> str:
    """Returns the only attribute of its kind; with two, readers could disagree on the holder."""
    (attribute,) = name.get_attributes_for_oid(kind)
    if not isinstance(attribute.value, str):
        raise TypeError("expected text")
    return attribute.value


def _check_time(certificate: x509.Certificate, *, now: datetime, where: str, remedy: str) -> None:
    first, last = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if now < first - SKEW:
        raise CertificateRefused(
            f"{where}: this certificate is valid from {first:%Y-%m-%d %H:%M} UTC, but this "
            f"machine's clock says {now:%Y-%m-%d %H:%M} UTC. It was refused; set the clock "
            "correctly and try again."
        )
    if now > last + SKEW:
        raise CertificateRefused(
            f"{where}: this certificate expired on {last:%Y-%m-%d %H:%M} UTC, but this machine's "
            f"clock says {now:%Y-%m-%d %H:%M} UTC. It was refused; check that the clock is "
            f"right, or {remedy}."
        )
