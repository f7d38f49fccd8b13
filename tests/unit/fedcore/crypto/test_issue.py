from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.hashes import SHA384
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from fedcore.crypto.certificates import check_certificate
from fedcore.crypto.issue import check_host, issue_authority, make_request, read_request
from fedcore.crypto.keys import new_key
from fedcore.errors import CertificateRefused, ConfigError


def test_a_request_carries_the_key_and_a_name() -> None:
    key = new_key()
    request = read_request(make_request(key, "edge-1"), where="request")
    assert request.name == "edge-1"
    assert request.public_key == key.public_key()


def test_a_request_that_asks_for_more_gets_no_more(project: Any, now: Any) -> None:
    key = new_key()
    asking = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(
            x509.Name(
                [
                    x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, "operator"),
                    x509.NameAttribute(NameOID.COMMON_NAME, "edge-1"),
                ]
            )
        )
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("fl.example")]), critical=False)
        .sign(key, SHA384())
    )
    request = read_request(asking.public_bytes(Encoding.PEM), where="request")
    certificate = project.certify(key, request.name)
    subject = check_certificate(certificate, project.authority, now=now, where="kit")
    assert (subject.name, subject.role) == ("edge-1", "device")
    with pytest.raises(x509.ExtensionNotFound):
        certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    constraints = certificate.extensions.get_extension_for_class(x509.BasicConstraints)
    assert constraints.value.ca is False


def requests_that_are_none() -> list[bytes]:
    raw = make_request(new_key(), "edge-1")
    small = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    der = x509.load_pem_x509_csr(raw).public_bytes(Encoding.DER)
    stolen = bytearray(der)
    stolen[-1] ^= 1  # the proof that the sender holds the key
    return [
        b"",
        b"garbage",
        raw[:-60],
        raw + b"\n" * 9000,
        der,
        small.sign(generate_private_key(SECP256R1()), SHA384()).public_bytes(Encoding.PEM),
        small.sign(new_key(), SHA384()).public_bytes(Encoding.PEM),
        x509.load_der_x509_csr(bytes(stolen)).public_bytes(Encoding.PEM),
    ]


@pytest.mark.parametrize("raw", requests_that_are_none())
def test_what_is_no_request_is_refused(raw: bytes) -> None:
    with pytest.raises(CertificateRefused, match=r"request\.pem: expected a signing request"):
        read_request(raw, where="request.pem")


BAD_NAMES = [
    "",
    "../edge",
    "/etc/passwd",
    "edge/1",
    "a" * 65,
    "Edge",
    "edge 1",
    "édge",
    "-edge",
    "edge\n",
    "edge\x00",
]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_a_name_that_could_be_a_path_or_a_trick_is_refused(
    project: Any, now: Any, name: str
) -> None:
    key = new_key()
    for use in (
        lambda: make_request(key, name),
        lambda: project.certify(key, name),
        lambda: issue_authority(key, project=name, now=now),
    ):
        with pytest.raises(ConfigError, match="expected 1 to 64 of a-z, 0-9"):
            use()


@pytest.mark.parametrize(
    ("host", "said"),
    [
        ("fl.example.org", "fl.example.org"),
        ("FL.Example.org", "fl.example.org"),
        ("localhost", "localhost"),
        ("10.0.0.5", "10.0.0.5"),
        ("2001:db8::1", "2001:db8::1"),
    ],
)
def test_hosts_are_names_or_addresses(host: str, said: str) -> None:
    assert str(check_host(host).value) == said


@pytest.mark.parametrize(
    "host",
    [
        "",
        "https://fl.example",
        "fl.example:9092",
        "fl..example",
        "-fl.example",
        "10.0.0.256",
        "1.2.3",
        "*.example",
        "fl example",
        "bücher.example",
        "a" * 64,
        "a." * 127 + "a",
        "fl.example\n",
    ],
)
def test_what_is_no_host_is_refused(project: Any, host: str) -> None:
    with pytest.raises(ConfigError, match="expected a DNS name or an IP address"):
        project.certify_server(new_key(), host)


@pytest.mark.parametrize(
    ("host", "said"),
    [
        ("fe80::1%eth0", r"without a zone \(%eth0\)"),
        ("0.0.0.0", "a wildcard that nobody can connect to"),
        ("::", "a wildcard that nobody can connect to"),
    ],
)
def test_addresses_that_reach_no_server_are_refused(host: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        check_host(host)


def test_a_server_has_one_to_thirty_hosts(project: Any, tmp_path: Path) -> None:
    hosts = [f"fl-{number}.example" for number in range(31)]
    assert project.certify_server(new_key(), *hosts[:30])
    for wrong in ([], hosts):
        with pytest.raises(ConfigError, match="expected 1 to 30"):
            project.certify_server(new_key(), *wrong)
