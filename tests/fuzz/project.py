"""A project to fuzz: an authority, certificates that it issued, and some that it never should."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cache
from random import Random

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.hashes import SHA256, SHA384
from cryptography.x509.oid import NameOID

from fedcore.crypto.certificates import pem
from fedcore.crypto.issue import issue_authority, issue_member, issue_server
from fedcore.crypto.keys import new_key
from tests.fuzz.mutate import damaged

NOW = datetime.now(UTC).replace(microsecond=0)
_NAMES = ("\x1b[2J", "a\nb", "\u202e", "x" * 64, "edge-0", "", "naïve", "a/b", "\0")


@dataclass(frozen=True)
class FuzzedProject:
    """An authority with its key."""

    key: ec.EllipticCurvePrivateKey
    authority: x509.Certificate

    @property
    def authority_pem(self) -> str:
        return pem(self.authority).decode()


@cache
def project() -> FuzzedProject:
    key = new_key()
    return FuzzedProject(key, issue_authority(key, project="trial", now=NOW))


@cache
def member_keys() -> tuple[ec.EllipticCurvePrivateKey, ...]:
    return tuple(new_key() for _ in range(6))


@cache
def certificates() -> tuple[str, ...]:
    """Of devices, an operator and a server: what is in force, as PEM."""
    held = project()
    roles = ("device", "device", "device", "device", "operator", "viewer")
    members = [
        issue_member(
            key.public_key(),
            name=f"edge-{number}",
            role=role,  # type: ignore[arg-type]
            authority=held.authority,
            authority_key=held.key,
            now=NOW,
            validity=timedelta(days=90),
        )
        for number, (key, role) in enumerate(zip(member_keys(), roles, strict=True))
    ]
    server = issue_server(
        new_key().public_key(),
        hosts=["127.0.0.1", "localhost"],
        authority=held.authority,
        authority_key=held.key,
        now=NOW,
    )
    return tuple(pem(one).decode() for one in (*members, server))


@cache
def odd_certificates() -> tuple[str, ...]:
    """Signed by the authority, or by itself, and none that `fedcore provision` would issue."""
    held, rng, made = project(), Random(1), list[str]()
    keys = (
        new_key(),
        ec.generate_private_key(ec.SECP256R1()),
        ed25519.Ed25519PrivateKey.generate(),
    )
    keys = (*keys, rsa.generate_private_key(65537, 2048))  # type: ignore[assignment]
    template = x509.load_pem_x509_certificate(certificates()[0].encode())
    for _ in range(80):
        builder = x509.CertificateBuilder(
            issuer_name=rng.choice((held.authority.subject, template.subject)),
            subject_name=rng.choice((template.subject, _odd_name(rng), x509.Name([]))),
            public_key=rng.choice((template.public_key(), rng.choice(keys).public_key())),
            serial_number=rng.choice((1, x509.random_serial_number(), 2**158)),
            not_valid_before=NOW + timedelta(days=rng.choice((-400, -1, -1, 10))),
            not_valid_after=NOW + timedelta(days=rng.choice((20, 20, 90, 100_000))),
        )
        for extension in template.extensions:
            if rng.randrange(5):
                builder = builder.add_extension(extension.value, rng.randrange(2) == 0)
        if rng.randrange(3) == 0:
            oid = x509.ObjectIdentifier("1.2.3.4.5")
            builder = builder.add_extension(
                x509.UnrecognizedExtension(oid, b"\x1b" * rng.choice((1, 3000))),
                rng.choice((0, 1)) == 1,
            )
        signer = rng.choice((held.key, held.key, new_key()))
        made.append(pem(builder.sign(signer, rng.choice((SHA384(), SHA256())))).decode())
    return tuple(made)


def _odd_name(rng: Random) -> x509.Name:
    kinds = (NameOID.COMMON_NAME, NameOID.ORGANIZATION_NAME, NameOID.ORGANIZATIONAL_UNIT_NAME)
    return x509.Name(
        [
            x509.NameAttribute(rng.choice(kinds), rng.choice(_NAMES) or "x")
            for _ in range(rng.randrange(1, 5))
        ]
    )


def repem(rng: Random, text: str) -> str:
    """A certificate whose inner bytes were changed, in proper PEM again."""
    lines = [line for line in text.splitlines() if line and not line.startswith("-")]
    raw = damaged(rng, base64.b64decode("".join(lines)))
    inner = base64.encodebytes(raw).decode()
    return f"-----BEGIN CERTIFICATE-----\n{inner}-----END CERTIFICATE-----\n"
