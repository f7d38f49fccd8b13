from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.hashes import SHA256, SHA384
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedcore.crypto.certificates import (
    SKEW,
    certificate_sha256,
    check_authority,
    check_certificate,
    parse_certificate,
    peer_public,
    pem,
    subject_of,
)
from fedcore.crypto.issue import issue_authority
from fedcore.crypto.keys import new_key, public_bytes
from fedcore.errors import CertificateRefused

QUARTER = timedelta(days=90)
MINUTE = timedelta(minutes=1)


def check(certificate: x509.Certificate, project: Any, now: datetime) -> Any:
    return check_certificate(certificate, project.authority, now=now, where="kit")


def test_a_certificate_says_who_in_which_role(project: Any, now: datetime) -> None:
    key = new_key()
    certificate = project.certify(key, "anna", "operator")
    subject = check(certificate, project, now)
    assert (subject.project, subject.name, subject.role) == ("orchard", "anna", "operator")
    assert subject.public == public_bytes(key)
    assert subject.serial == f"{certificate.serial_number:x}"
    assert subject.not_after == now + QUARTER
    assert check(project.certify_server(key, "localhost"), project, now).role == "server"


def test_constraints_and_usages_are_those_of_the_role(project: Any) -> None:
    def extension(certificate: x509.Certificate, kind: Any) -> Any:
        return certificate.extensions.get_extension_for_class(kind)

    for certificate, purpose in (
        (project.certify(new_key(), "edge-1"), ExtendedKeyUsageOID.CLIENT_AUTH),
        (project.certify_server(new_key(), "localhost"), ExtendedKeyUsageOID.SERVER_AUTH),
    ):
        assert extension(certificate, x509.BasicConstraints).value.ca is False
        usage = extension(certificate, x509.KeyUsage)
        assert usage.critical
        assert usage.value.digital_signature
        assert not usage.value.key_cert_sign
        assert list(extension(certificate, x509.ExtendedKeyUsage).value) == [purpose]
        assert isinstance(certificate.signature_hash_algorithm, SHA384)
    constraints = extension(project.authority, x509.BasicConstraints)
    assert constraints.critical
    assert constraints.value == x509.BasicConstraints(ca=True, path_length=0)


def test_serials_are_random(project: Any) -> None:
    key = new_key()
    serials = {project.certify(key, "edge-1").serial_number for _ in range(20)}
    assert len(serials) == 20
    assert min(serial.bit_length() for serial in serials) > 64


def test_a_clock_ten_minutes_off_locks_nobody_out(project: Any, now: datetime) -> None:
    certificate = project.certify(new_key(), "edge-1")
    for wrong in (-SKEW, SKEW, QUARTER + SKEW):
        assert check(certificate, project, now + wrong).name == "edge-1"
    assert certificate.not_valid_before_utc <= now - 2 * SKEW  # both clocks may be wrong


def test_beyond_that_it_has_expired_or_is_not_valid_yet(project: Any, now: datetime) -> None:
    certificate = project.certify(new_key(), "edge-1")
    with pytest.raises(CertificateRefused, match=r"expired on .*check that the clock is right"):
        check(certificate, project, now + QUARTER + SKEW + MINUTE)
    with pytest.raises(CertificateRefused, match=r"is valid from .*set the clock correctly"):
        check(certificate, project, now - 3 * SKEW - MINUTE)
    assert subject_of(certificate, project.authority, where="kit").name == "edge-1"


def test_no_certificate_outlives_its_authority(project: Any, now: datetime) -> None:
    long = project.certify(new_key(), "edge-1", validity=timedelta(days=36500))
    assert long.not_valid_after_utc == project.authority.not_valid_after_utc


def test_another_authority_of_the_same_name_counts_for_nothing(
    project: Any, impostor: Any, now: datetime
) -> None:
    with pytest.raises(CertificateRefused, match="not issued by the authority trusted"):
        check(impostor.certify(new_key(), "edge-1"), project, now)


def test_a_member_certifies_nobody(project: Any, now: datetime) -> None:
    key = new_key()
    member = project.certify(key, "edge-1", "operator")
    forged = (
        x509.CertificateBuilder()
        .subject_name(member.subject)
        .issuer_name(member.subject)
        .public_key(new_key().public_key())
        .serial_number(1)
        .not_valid_before(now)
        .not_valid_after(now + QUARTER)
        .sign(key, SHA384())
    )
    with pytest.raises(CertificateRefused, match="not issued by"):
        check(forged, project, now)
    with pytest.raises(CertificateRefused, match="expected the certificate of a project's auth"):
        check_authority(member, now=now, where="kit")


def signed(project: Any, now: datetime, **changed: Any) -> x509.Certificate:
    """A certificate that the authority's key signed, with one part not as it is issued."""
    key = changed.get("key") or new_key()
    subject = [
        x509.NameAttribute(NameOID.ORGANIZATION_NAME, changed.get("organization", "orchard")),
        x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, changed.get("role", "device")),
        *(
            x509.NameAttribute(NameOID.COMMON_NAME, name)
            for name in changed.get("names", ["edge-1"])
        ),
    ]
    usage = {
        "digital_signature": True,
        "content_commitment": False,
        "key_encipherment": False,
        "data_encipherment": False,
        "key_agreement": False,
        "key_cert_sign": False,
        "crl_sign": False,
        "encipher_only": False,
        "decipher_only": False,
        **changed.get("usage", {}),
    }
    purposes = changed.get("purposes", [ExtendedKeyUsageOID.CLIENT_AUTH])
    return (
        x509.CertificateBuilder()
        .subject_name(x509.Name(subject))
        .issuer_name(project.authority.subject)
        .public_key(key.public_key())
        .serial_number(7)
        .not_valid_before(now)
        .not_valid_after(now + QUARTER)
        .add_extension(x509.BasicConstraints(changed.get("ca", False), None), critical=True)
        .add_extension(x509.KeyUsage(**usage), critical=True)
        .add_extension(x509.ExtendedKeyUsage(purposes), critical=True)
        .sign(project.key, changed.get("digest", SHA384()))
    )


def test_the_form_itself_is_accepted(project: Any, now: datetime) -> None:
    assert check(signed(project, now), project, now).name == "edge-1"


@pytest.mark.parametrize(
    "changed",
    [
        {"role": "admin"},
        {"role": "server"},
        {"role": "Device"},
        {"names": []},
        {"names": ["edge-1", "edge-2"]},
        {"names": ["../edge-1"]},
        {"organization": "another"},
        {"ca": True},
        {"usage": {"key_cert_sign": True}},
        {"purposes": [ExtendedKeyUsageOID.SERVER_AUTH]},
        {"purposes": [ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH]},
        {"purposes": [ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE]},
        {"key": generate_private_key(SECP256R1())},
        {"digest": SHA256()},
    ],
    ids=lambda changed: "-".join(changed),
)
def test_whatever_is_not_as_it_is_issued_is_refused(
    project: Any, now: datetime, changed: dict[str, Any]
) -> None:
    with pytest.raises(CertificateRefused, match="does not have the form"):
        check(signed(project, now, **changed), project, now)


def test_one_that_lacks_its_extensions_is_refused(project: Any, now: datetime) -> None:
    bare = (
        x509.CertificateBuilder()
        .subject_name(project.certify(new_key(), "edge-1").subject)
        .issuer_name(project.authority.subject)
        .public_key(new_key().public_key())
        .serial_number(7)
        .not_valid_before(now)
        .not_valid_after(now + QUARTER)
        .sign(project.key, SHA384())
    )
    with pytest.raises(CertificateRefused, match="does not have the form"):
        check(bare, project, now)


@pytest.mark.filterwarnings("ignore:Parsed a serial number")
def test_no_changed_byte_goes_unnoticed(project: Any, now: datetime) -> None:
    der = project.certify(new_key(), "edge-1").public_bytes(Encoding.DER)
    refused = 0
    for place in range(len(der)):
        changed = bytearray(der)
        changed[place] ^= 1 << place % 8
        try:
            certificate = x509.load_der_x509_certificate(bytes(changed))
        except (ValueError, x509.InvalidVersion):
            continue
        with pytest.raises(CertificateRefused):
            check(certificate, project, now)
        refused += 1
    assert refused > 200


def test_an_authority_is_told_from_anything_else(project: Any, now: datetime) -> None:
    assert check_authority(project.authority, now=now, where="kit") == "orchard"
    for other in (
        project.certify(new_key(), "edge-1"),
        project.certify_server(new_key(), "localhost"),
    ):
        with pytest.raises(CertificateRefused, match="expected the certificate of a project"):
            check_authority(other, now=now, where="kit")
    with pytest.raises(CertificateRefused, match="expired"):
        check_authority(project.authority, now=now + timedelta(days=4000), where="kit")
    small: Any = generate_private_key(SECP256R1())
    with pytest.raises(CertificateRefused, match="expected the certificate of a project"):
        check_authority(issue_authority(small, project="orchard", now=now), now=now, where="kit")


def test_only_one_pem_of_bounded_size_is_parsed(project: Any) -> None:
    raw = pem(project.authority)
    assert parse_certificate(raw, where="kit") == project.authority
    for wrong in (b"", b"garbage", raw[:200], raw * 2, raw + b" " * 9000):
        with pytest.raises(CertificateRefused, match="expected one certificate"):
            parse_certificate(wrong, where="kit")


def test_a_peers_key_is_the_one_that_its_kit_names(project: Any) -> None:
    key = new_key()
    der = project.certify(key, "edge-1").public_bytes(Encoding.DER)
    assert peer_public(der) == public_bytes(key)
    small: Any = generate_private_key(SECP256R1())
    other = project.certify(small, "edge-1").public_bytes(Encoding.DER)
    for wrong in (b"", b"garbage", der[:-9], other):
        with pytest.raises(CertificateRefused, match="expected a P-384 key"):
            peer_public(wrong)


def test_a_fingerprint_is_openssls(project: Any) -> None:
    got = certificate_sha256(project.authority)
    assert got == project.authority.fingerprint(SHA256()).hex()
    assert len(got) == 64
