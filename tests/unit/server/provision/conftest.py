"""An authority in a folder, with a server."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from fedcore.crypto.issue import make_request
from fedcore.crypto.keys import new_key, save_key
from fedcore.crypto.kit import KEY, KitFile, write_kit
from server.provision.issue import Act, initialise, provision_member, provision_server, renew

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
QUARTER = timedelta(days=90)


class Desk:
    """What an operator has at hand, in few words."""

    def __init__(self, folder: Path) -> None:
        self.act = Act(folder, "anna@desk", NOW)

    @property
    def folder(self) -> Path:
        return self.act.folder

    def at(self, now: datetime) -> Act:
        return replace(self.act, now=now)

    def begin(self) -> Desk:
        initialise(self.act, "orchard")
        self.server("localhost")
        return self

    def server(self, *hosts: str, again: bool = False) -> KitFile:
        return provision_server(self.act, hosts, port=9092, validity=QUARTER, again=again)

    def certify(self, name: str, role: Any = "device", **more: Any) -> KitFile:
        key = more.pop("key", None) or new_key()
        request = more.pop("request", None) or make_request(key, name)
        return provision_member(
            more.pop("act", self.act),
            name,
            role,
            request,
            where="request.pem",
            validity=QUARTER,
            num_examples=more.pop("num_examples", None),
        )

    def renew(self, name: str, now: datetime) -> KitFile:
        return renew(self.at(now), name, validity=QUARTER)

    def holder(self, folder: Path, name: str, role: Any = "device") -> Path:
        """A member's folder, key and kit in it."""
        key = new_key()
        save_key(folder / KEY, key)
        write_kit(folder, self.certify(name, role, key=key))
        return folder


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a second for each guess is half a second for each test."""
    monkeypatch.setattr("fedcore.crypto.sealing._COST", 1 << 10)


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path / "authority").begin()


@pytest.fixture
def bare(tmp_path: Path) -> Desk:
    """Before there is an authority."""
    return Desk(tmp_path / "authority")
