"""A project, a signed repository and its delivery service, for tests and benchmarks.

`Delivering` makes identities in memory; `served` runs the service in a thread.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from fedcore.crypto.certificates import MemberRole, pem
from fedcore.crypto.issue import issue_authority, issue_member, issue_server
from fedcore.crypto.keys import new_key, save_key
from fedcore.crypto.kit import KEY, KitFile, write_kit
from fedcore.crypto.roster import ROSTER, RosterEntry, RosterFile, ServerIdentity
from fedcore.crypto.roster import load_server_identity as load_server
from server.delivery.serve import DeliveryAddress, serve_releases_in_thread

HOST = "127.0.0.1"


@dataclass
class Delivering:
    """An authority, a server and devices, each with a folder of its own below ``folder``."""

    folder: Path
    entries: dict[str, RosterEntry] = field(default_factory=dict)
    version: int = 0

    def __post_init__(self) -> None:
        self.now = datetime.now(UTC).replace(microsecond=0)
        self.key = new_key()
        self.authority = issue_authority(self.key, project="orchard", now=self.now)
        key = new_key()
        certificate = issue_server(
            key.public_key(),
            hosts=(HOST,),
            authority=self.authority,
            authority_key=self.key,
            now=self.now,
        )
        self._install(self.folder / "server", key, certificate)
        self.write_roster()

    @property
    def server(self) -> ServerIdentity:
        return load_server(self.folder / "server")

    def devices(self, names: Sequence[str]) -> list[Path]:
        """Enrols many devices at once, and returns the folders of their kits."""
        folders = [self.device(name, written=False) for name in names]
        self.write_roster()
        return folders

    def device(
        self,
        name: str,
        *,
        role: MemberRole = "device",
        listed: bool = True,
        written: bool = True,
    ) -> Path:
        """Enrols a member, and returns the folder of its kit."""
        key = new_key()
        certificate = issue_member(
            key.public_key(),
            name=name,
            role=role,
            authority=self.authority,
            authority_key=self.key,
            now=self.now,
            validity=timedelta(days=1),
        )
        self._install(self.folder / "kits" / name, key, certificate)
        if listed:
            self.entries[name] = RosterEntry(certificate=pem(certificate).decode())
        if listed and written:
            self.write_roster()
        return self.folder / "kits" / name

    def revoke(self, name: str) -> None:
        self.entries[name] = self.entries[name].model_copy(update={"revoked_at": datetime.now(UTC)})
        self.write_roster()

    def write_roster(self) -> None:
        self.version += 1
        roster = RosterFile(version=self.version, members=tuple(self.entries.values()))
        path = self.folder / "server" / ROSTER
        made = path.with_suffix(".new")
        made.write_bytes(roster.signed(self.key).to_bytes())
        made.replace(path)

    def _install(self, folder: Path, key: Any, certificate: Any) -> None:
        save_key(folder / KEY, key)
        write_kit(
            folder,
            KitFile(
                servers=(f"https://{HOST}:9092",),
                certificate=pem(certificate).decode(),
                authority=pem(self.authority).decode(),
            ),
        )

    @contextmanager
    def served(
        self, repository: Path, on_report: Callable[..., None] = lambda member, report: None
    ) -> Iterator[int]:
        """Runs the delivery service in a thread; yields its port."""
        address = DeliveryAddress(HOST, 0)
        with serve_releases_in_thread(
            self.server, repository, address, on_report=on_report
        ) as port:
            yield port
