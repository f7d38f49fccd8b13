"""Issues certificates: signing requests in, certificates signed by the authority out."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from ipaddress import IPv4Address, IPv6Address, ip_address

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ec import (
    SECP384R1,
    EllipticCurvePrivateKey,
    EllipticCurvePublicKey,
)
from cryptography.hazmat.primitives.hashes import SHA384
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from fedcore.crypto.certificates import (
    MAX_CERTIFICATE_BYTES,
    SKEW,
    UNREADABLE,
    MemberRole,
    Role,
    check_name,
    extended_key_usage,
    key_usage,
    single_attribute,
)
from fedcore.errors import CertificateRefused, ConfigError

BACKDATE = 2 * SKEW
"""Validity begins this long before issue: the issuer's clock may be fast and the reader's slow."""
AUTHORITY_VALIDITY = timedelta(days=3650)
SERVER_VALIDITY = timedelta(days=365)
MEMBER_VALIDITY = timedelta(days=90)
"""Bounds the use of a key that was stolen unnoticed."""

_HOST = re.compile(r"(?!-)[A-Za-z0-9-]{1,63}(?<!-)(\.(?!-)[A-Za-z0-9-]{1,63}(?<!-))*")
_MAX_HOSTS = 30


@dataclass(frozen=True)
class CertificateRequest:
    """A signing request whose sender has proved to have the private key."""

    name: str
    """The name that the sender proposes; the operator decides."""
    public_key: EllipticCurvePublicKey


def check_host(host: str) -> x509.DNSName | x509.IPAddress:
    """Returns a server's name or address for a certificate; raises `ConfigError` if invalid."""
    try:
        address = ip_address(host)
    except ValueError:
        pass
    else:
        _check_reachable(address)
        return x509.IPAddress(address)
    # Digits and dots only are a malformed address, not a name.
    if len(host) > 253 or not _HOST.fullmatch(host) or re.fullmatch(r"[0-9.]+", host):
        raise ConfigError(
            f"host {host!r}: expected a DNS name or an IP address, without scheme or port, e.g. "
            "fl.example.org or 10.0.0.5. Nothing was written."
        )
    return x509.DNSName(host.lower())


def _check_reachable(address: IPv4Address | IPv6Address) -> None:
    """Rejects addresses that no other machine can connect to."""
    if address.is_unspecified:
        raise ConfigError(
            f"host {str(address)!r}: expected an address at which devices can reach the server; "
            "this one is a wildcard that nobody can connect to. Nothing was written; give a DNS "
            "name or an address, e.g. 10.0.0.5."
        )
    if isinstance(address, IPv6Address) and address.scope_id is not None:
        raise ConfigError(
            f"host {str(address)!r}: expected an address without a zone (%{address.scope_id}), "
            "which is only valid on one machine. Nothing was written; give an address, e.g. "
            "2001:db8::5, or a DNS name."
        )


def issue_authority(
    key: EllipticCurvePrivateKey, *, project: str, now: datetime
) -> x509.Certificate:
    """Returns the self-signed certificate of a project's authority, which signs no authorities."""
    name = x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, check_name(project, "project")),
            x509.NameAttribute(NameOID.COMMON_NAME, f"{project} authority"),
        ]
    )
    own = key.public_key()
    return (
        _builder(name, name, own, own, now, now + AUTHORITY_VALIDITY)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(key_usage(signs_certificates=True), critical=True)
        .sign(key, SHA384())
    )


def issue_server(
    public: EllipticCurvePublicKey,
    *,
    hosts: Sequence[str],
    authority: x509.Certificate,
    authority_key: EllipticCurvePrivateKey,
    now: datetime,
    validity: timedelta = SERVER_VALIDITY,
) -> x509.Certificate:
    """Returns the certificate of the project's server for all of its names and addresses.

    Raises:
        ConfigError: a host is neither a DNS name nor an address, or there are none or too many.
    """
    if not 1 <= len(hosts) <= _MAX_HOSTS:
        raise ConfigError(f"{len(hosts)} hosts: expected 1 to {_MAX_HOSTS}. Nothing was written.")
    names = x509.SubjectAlternativeName([check_host(host) for host in hosts])
    builder = _end_entity(public, "server", "server", authority, now, validity)
    return builder.add_extension(names, critical=False).sign(authority_key, SHA384())


def issue_member(
    public: EllipticCurvePublicKey,
    *,
    name: str,
    role: MemberRole,
    authority: x509.Certificate,
    authority_key: EllipticCurvePrivateKey,
    now: datetime,
    validity: timedelta = MEMBER_VALIDITY,
) -> x509.Certificate:
    """Returns the certificate of a device, an operator or a viewer.

    Raises:
        ConfigError: the name is invalid in a certificate.
    """
    builder = _end_entity(public, check_name(name), role, authority, now, validity)
    return builder.sign(authority_key, SHA384())


def make_request(key: EllipticCurvePrivateKey, name: str) -> bytes:
    """Returns a signing request (PKCS#10 PEM): public key, name, and proof of the private key."""
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, check_name(name))])
    request = x509.CertificateSigningRequestBuilder().subject_name(subject).sign(key, SHA384())
    return request.public_bytes(Encoding.PEM)


def read_request(raw: bytes, *, where: str) -> CertificateRequest:
    """Reads a signing request; uses only its key and common name.

    Raises:
        CertificateRefused: the bytes are no such request, the key is not on P-384, or the request
            does not prove possession of the private key.
    """
    try:
        request = x509.load_pem_x509_csr(raw) if len(raw) <= MAX_CERTIFICATE_BYTES else None
        if request is not None and request.is_signature_valid:
            public = request.public_key()
            if isinstance(public, EllipticCurvePublicKey) and isinstance(public.curve, SECP384R1):
                return CertificateRequest(
                    single_attribute(request.subject, NameOID.COMMON_NAME), public
                )
    except UNREADABLE:
        pass
    raise CertificateRefused(
        f"{where}: expected a signing request (PKCS#10 PEM) over a P-384 key, signed by that "
        "key, found something else. No certificate was issued; create one with `fedcore client "
        "enrol`."
    )


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    public: EllipticCurvePublicKey,
    issuer_public: EllipticCurvePublicKey,
    now: datetime,
    not_after: datetime,
) -> x509.CertificateBuilder:
    identifier = x509.SubjectKeyIdentifier.from_public_key(public)
    by = x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_public)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - BACKDATE)
        .not_valid_after(not_after)
        .add_extension(identifier, critical=False)
        .add_extension(by, critical=False)
    )


def _end_entity(
    public: EllipticCurvePublicKey,
    name: str,
    role: Role,
    authority: x509.Certificate,
    now: datetime,
    validity: timedelta,
) -> x509.CertificateBuilder:
    project = single_attribute(authority.subject, NameOID.ORGANIZATION_NAME)
    subject = x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, project),
            x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, role),
            x509.NameAttribute(NameOID.COMMON_NAME, name),
        ]
    )
    issuer_public = authority.public_key()
    assert isinstance(issuer_public, EllipticCurvePublicKey)
    until = min(now + validity, authority.not_valid_after_utc)
    return (
        _builder(subject, authority.subject, public, issuer_public, now, until)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(key_usage(signs_certificates=False), critical=True)
        .add_extension(extended_key_usage(role), critical=True)
    )
