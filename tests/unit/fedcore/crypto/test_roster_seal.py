"""A roster that somebody else than the authority has written."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from fedcore.crypto.certificates import pem
from fedcore.crypto.keys import new_key, public_bytes
from fedcore.crypto.roster import ROSTER, Roster, RosterEntry, RosterFile, parse_roster
from fedcore.crypto.roster_seal import delegate
from fedcore.crypto.roster_seen import SEEN
from fedcore.errors import RollbackRefused, SignatureInvalid


@pytest.fixture(scope="session")
def keys() -> list[Any]:
    return [new_key() for _ in range(3)]


@pytest.fixture(scope="session")
def entries(project: Any, keys: list[Any]) -> list[RosterEntry]:
    return [
        RosterEntry(
            certificate=pem(project.certify(key, f"edge-{number}")).decode(), num_examples=600
        )
        for number, key in enumerate(keys)
    ]


def write(folder: Path, project: Any, version: int, *entries: RosterEntry) -> Path:
    path = folder / ROSTER
    path.write_bytes(RosterFile(version=version, members=entries).signed(project.key).to_bytes())
    return path


def open_roster(path: Path, project: Any) -> Roster:
    return Roster(path, pem(project.authority))


def revoked(entry: RosterEntry, now: datetime) -> RosterEntry:
    return entry.model_copy(update={"revoked_at": now})


def changed(path: Path, **update: Any) -> None:
    """Edits a roster's first member by hand."""
    file = json.loads(path.read_bytes())
    file["members"][0] |= update
    path.write_text(json.dumps(file))


@pytest.mark.parametrize("update", [{"revoked_at": None}, {"num_examples": 1_000_000}])
def test_a_roster_that_was_edited_is_refused_and_the_one_before_stays(
    tmp_path: Path,
    project: Any,
    keys: list[Any],
    entries: list[RosterEntry],
    now: datetime,
    update: dict[str, Any],
) -> None:
    path = write(tmp_path, project, 1, revoked(entries[0], now), *entries[1:])
    roster = open_roster(path, project)
    changed(path, **update)
    assert roster.member(public_bytes(keys[0])) is None
    assert "signature is invalid" in str(roster.damage)
    with pytest.raises(SignatureInvalid, match="changed by hand"):
        open_roster(path, project)


def test_a_roster_without_a_signature_or_with_a_strangers_is_refused(
    tmp_path: Path, project: Any, entries: list[RosterEntry]
) -> None:
    path, stranger = tmp_path / ROSTER, new_key()
    file = RosterFile(version=1, members=tuple(entries))
    forged = delegate(stranger, 1, stranger)
    for each in (file, file.signed(stranger), file.signed(stranger, forged)):
        path.write_bytes(each.to_bytes())
        with pytest.raises(SignatureInvalid, match="signed"):
            open_roster(path, project)
    raw = file.to_bytes()
    assert parse_roster(raw, project.authority, where="x", unsigned=True)[0] == file


def test_a_key_of_rosters_is_vouched_for_and_gives_way_for_good(
    tmp_path: Path, project: Any, keys: list[Any], entries: list[RosterEntry]
) -> None:
    path, signing = tmp_path / ROSTER, [new_key(), new_key()]
    signers = [delegate(key, number, project.key) for number, key in enumerate(signing, start=1)]
    path.write_bytes(
        RosterFile(version=3, members=tuple(entries)).signed(signing[0], signers[0]).to_bytes()
    )
    seen = tmp_path / SEEN
    roster = Roster(path, pem(project.authority), seen=seen)
    newer = RosterFile(version=4, members=tuple(entries[1:])).signed(signing[1], signers[1])
    path.write_bytes(newer.to_bytes())
    assert roster.member(public_bytes(keys[0])) is None
    # The key before may have been stolen: whatever version it signs is older than the new key.
    stolen = RosterFile(version=9, members=tuple(entries)).signed(signing[0], signers[0])
    path.write_bytes(stolen.to_bytes())
    assert roster.member(public_bytes(keys[0])) is None
    assert roster.damage is not None
    with pytest.raises(RollbackRefused, match="signature of key 1, which key 2"):
        Roster(path, pem(project.authority), seen=seen)
