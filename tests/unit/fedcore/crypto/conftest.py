"""A project with an authority, in memory; certificates and kits as tests need them."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey

from fedcore.crypto.certificates import MemberRole, pem
from fedcore.crypto.issue import issue_authority, issue_member, issue_server
from fedcore.crypto.keys import new_key, save_key
from fedcore.crypto.kit import KEY, KitFile, write_kit

QUARTER = timedelta(days=90)


@dataclass
class Project:
    """An authority and its key."""

    name: str
    now: datetime
    key: EllipticCurvePrivateKey = field(default_factory=new_key)

    authority: x509.Certificate = field(init=False)

    def __post_init__(self) -> None:
        self.authority = issue_authority(self.key, project=self.name, now=self.now)

    def certify(
        self,
        key: EllipticCurvePrivateKey,
        name: str,
        role: MemberRole = "device",
        *,
        now: datetime | None = None,
        validity: timedelta = QUARTER,
    ) -> x509.Certificate:
        return issue_member(
            key.public_key(),
            name=name,
            role=role,
            authority=self.authority,
            authority_key=self.key,
            now=now or self.now,
            validity=validity,
        )

    def certify_server(self, key: EllipticCurvePrivateKey, *hosts: str) -> x509.Certificate:
        return issue_server(
            key.public_key(),
            hosts=hosts,
            authority=self.authority,
            authority_key=self.key,
            now=self.now,
        )

    def kit(
        self, folder: Path, key: EllipticCurvePrivateKey, certificate: x509.Certificate
    ) -> Path:
        """A folder as its holder has it."""
        save_key(folder / KEY, key)
        write_kit(
            folder,
            KitFile(
                servers=("https://localhost:9092", "https://[::1]:9092"),
                certificate=pem(certificate).decode(),
                authority=pem(self.authority).decode(),
            ),
        )
        return folder

    def device(self, folder: Path, name: str = "edge-1") -> Path:
        key = new_key()
        return self.kit(folder, key, self.certify(key, name))

    def server(self, folder: Path, *hosts: str) -> Path:
        key = new_key()
        return self.kit(folder, key, self.certify_server(key, *(hosts or ("localhost", "::1"))))


@pytest.fixture(scope="session")
def now() -> datetime:
    """The system's time, as TLS sees it."""
    return datetime.now(UTC).replace(microsecond=0)


@pytest.fixture(scope="session")
def project(now: datetime) -> Project:
    """The project that is trusted."""
    return Project("orchard", now)


@pytest.fixture(scope="session")
def impostor(now: datetime) -> Project:
    """Another authority that uses the same name."""
    return Project("orchard", now)
