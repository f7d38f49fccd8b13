from __future__ import annotations

import sys
import threading
from datetime import datetime, timedelta
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from fedcore.crypto.certificates import pem
from fedcore.crypto.keys import fingerprint, new_key, public_bytes
from fedcore.crypto.roster import (
    ROSTER,
    Member,
    Roster,
    RosterEntry,
    RosterFile,
    load_server_identity,
    parse_roster,
)
from fedcore.crypto.roster_seen import SEEN, seen_version
from fedcore.errors import CertificateRefused, DataError, RollbackRefused, TrustError


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


class Clock:
    def __init__(self, now: datetime) -> None:
        self.now = now

    def __call__(self) -> datetime:
        return self.now


def write(folder: Path, project: Any, version: int, *entries: RosterEntry) -> Path:
    new = folder / "new"
    file = RosterFile(version=version, members=entries).signed(project.key)
    new.write_bytes(file.to_bytes())
    return new.replace(folder / ROSTER)


def open_roster(path: Path, project: Any, clock: Any = None) -> Roster:
    return Roster(path, pem(project.authority), **({"clock": clock} if clock else {}))


def revoked(entry: RosterEntry, now: datetime) -> RosterEntry:
    return entry.model_copy(update={"revoked_at": now})


def test_a_member_is_found_by_key_or_fingerprint(
    tmp_path: Path, project: Any, keys: list[Any], entries: list[RosterEntry], now: datetime
) -> None:
    roster = open_roster(write(tmp_path, project, 1, *entries[:2]), project)
    public = public_bytes(keys[0])
    member = roster.member(public)
    assert member == roster.member(fingerprint(public))
    assert member is not None
    assert (member.name, member.role, member.num_examples) == ("edge-0", "device", 600)
    assert member.public == public
    assert member.not_after == now + timedelta(days=90)
    assert roster.member(public_bytes(keys[2])) is None
    assert roster.member("edge-0") is None  # a name is no identity
    assert [m.name for m in roster.members()] == ["edge-0", "edge-1"]


def test_revocation_takes_effect_without_a_restart(
    tmp_path: Path, project: Any, keys: list[Any], entries: list[RosterEntry], now: datetime
) -> None:
    roster = open_roster(write(tmp_path, project, 1, *entries), project)
    write(tmp_path, project, 2, revoked(entries[0], now), *entries[1:])
    assert roster.member(public_bytes(keys[0])) is None
    assert roster.member(public_bytes(keys[1])) is not None
    assert [member.name for member in roster.members()] == ["edge-1", "edge-2"]
    assert roster.version == 2


def test_who_is_added_is_let_in_without_a_restart(
    tmp_path: Path, project: Any, keys: list[Any], entries: list[RosterEntry]
) -> None:
    roster = open_roster(write(tmp_path, project, 1), project)
    assert roster.members() == ()
    write(tmp_path, project, 2, entries[0])
    assert roster.member(public_bytes(keys[0])) is not None


def test_an_expired_member_is_out(
    tmp_path: Path, project: Any, keys: list[Any], entries: list[RosterEntry], now: datetime
) -> None:
    clock = Clock(now)
    roster = open_roster(write(tmp_path, project, 1, *entries), project, clock)
    clock.now = now + timedelta(days=90, minutes=10)
    assert roster.member(public_bytes(keys[0])) is not None
    clock.now += timedelta(seconds=1)
    assert roster.member(public_bytes(keys[0])) is None
    assert roster.members() == ()


def test_a_damaged_file_changes_nothing_until_it_is_whole(
    tmp_path: Path, project: Any, keys: list[Any], entries: list[RosterEntry], now: datetime
) -> None:
    path = write(tmp_path, project, 1, *entries)
    roster = open_roster(path, project)
    members = (revoked(entries[0], now), entries[1])
    whole = RosterFile(version=2, members=members).signed(project.key).to_bytes()
    for half in (whole[: len(whole) // 2], b"", b"garbage", b'{"version": 2}'):
        path.write_bytes(half)
        assert roster.member(public_bytes(keys[0])) is not None
        assert roster.damage is not None
        assert str(path) in roster.damage
    path.unlink()
    assert roster.member(public_bytes(keys[2])) is not None
    assert "does not exist" in str(roster.damage)
    path.write_bytes(whole)
    assert roster.member(public_bytes(keys[0])) is None
    assert roster.damage is None


def test_an_older_list_lets_nobody_back_in(
    tmp_path: Path, project: Any, keys: list[Any], entries: list[RosterEntry], now: datetime
) -> None:
    roster = open_roster(write(tmp_path, project, 2, revoked(entries[0], now)), project)
    write(tmp_path, project, 1, entries[0])
    assert roster.member(public_bytes(keys[0])) is None
    assert "version 1, but version 2 was in force" in str(roster.damage)


def test_a_list_that_is_damaged_from_the_start_starts_nothing(
    tmp_path: Path, project: Any, entries: list[RosterEntry]
) -> None:
    with pytest.raises(DataError, match=r"the roster does not exist\..*provision restore"):
        open_roster(tmp_path / ROSTER, project)
    path = write(tmp_path, project, 1, *entries)
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(TrustError, match="not a valid roster"):
        open_roster(path, project)


def test_nobody_gets_in_whom_the_authority_did_not_certify(
    tmp_path: Path, project: Any, impostor: Any, entries: list[RosterEntry]
) -> None:
    key = new_key()
    path = write(tmp_path, project, 1, *entries)
    roster = open_roster(path, project)
    forged = pem(impostor.certify(key, "edge-9")).decode()
    write(tmp_path, project, 2, *entries, RosterEntry(certificate=forged))
    assert roster.member(public_bytes(key)) is None
    assert "not issued by the authority" in str(roster.damage)
    with pytest.raises(CertificateRefused, match="not issued by"):
        open_roster(path, project)


def test_a_server_is_no_member(tmp_path: Path, project: Any) -> None:
    entry = RosterEntry(certificate=pem(project.certify_server(new_key(), "localhost")).decode())
    with pytest.raises(TrustError, match="certificate of a server"):
        open_roster(write(tmp_path, project, 1, entry), project)


def test_one_key_is_one_identity_and_so_is_one_name(
    tmp_path: Path, project: Any, keys: list[Any], entries: list[RosterEntry], now: datetime
) -> None:
    def again(key: Any, name: str) -> RosterEntry:
        return RosterEntry(certificate=pem(project.certify(key, name)).decode())

    for other in (again(keys[0], "edge-9"), again(new_key(), "edge-0"), entries[0]):
        with pytest.raises(TrustError, match="share a key or a name"):
            open_roster(write(tmp_path, project, 1, *entries, other), project)
    # A key that was revoked counts for nobody, whatever else is listed; its name may be used again.
    with pytest.raises(TrustError, match="share a key or a name"):
        open_roster(
            write(tmp_path, project, 1, revoked(entries[0], now), again(keys[0], "edge-0")), project
        )
    fresh = again(new_key(), "edge-0")
    roster = open_roster(write(tmp_path, project, 1, revoked(entries[0], now), fresh), project)
    assert [member.name for member in roster.members()] == ["edge-0"]


@pytest.mark.parametrize("num_examples", [0, -9, 1_000_001, 10**12, 1.5, True, "600"])
def test_a_weight_is_within_its_cap(
    project: Any, entries: list[RosterEntry], num_examples: object
) -> None:
    raw = RosterFile(version=1, members=tuple(entries[:1])).signed(project.key).to_bytes()
    text = str(num_examples).lower() if num_examples is True else repr(num_examples)
    changed = raw.replace(b'"num_examples": 600', f'"num_examples": {text}'.encode())
    assert changed != raw
    with pytest.raises(TrustError, match="num_examples"):
        parse_roster(changed.replace(b"'", b'"'), project.authority, where="roster")


def test_only_what_is_new_is_verified(
    tmp_path: Path, project: Any, entries: list[RosterEntry], monkeypatch: pytest.MonkeyPatch
) -> None:
    roster = open_roster(write(tmp_path, project, 1, *entries[:2]), project)
    seen: list[str] = []
    module = import_module("fedcore.crypto.roster")
    verify = module.subject_of

    def noted(*arguments: Any, **more: Any) -> Any:
        seen.append(more["where"])
        return verify(*arguments, **more)

    monkeypatch.setattr(module, "subject_of", noted)
    for _ in range(5):
        assert len(roster.members()) == 2
    assert seen == []  # the file is as it was
    write(tmp_path, project, 2, *entries)
    assert len(roster.members()) == 3
    assert [where.rpartition(" ")[2] for where in seen] == ["2"]


def test_many_threads_see_whole_lists_while_they_change(
    tmp_path: Path, project: Any, keys: list[Any], entries: list[RosterEntry], now: datetime
) -> None:
    roster = open_roster(write(tmp_path, project, 1, *entries), project)
    names: set[tuple[str, ...]] = set()
    errors: list[BaseException] = []
    done = threading.Event()

    def look() -> None:
        try:
            while not done.is_set():
                names.add(tuple(member.name for member in roster.members()))
                assert roster.member(public_bytes(keys[2])) is not None
        except BaseException as error:
            errors.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    threads = [threading.Thread(target=look) for _ in range(4)]
    try:
        for thread in threads:
            thread.start()
        for version in range(2, 40):
            first = revoked(entries[0], now) if version % 2 else entries[0]
            write(tmp_path, project, version, first, *entries[1:])
    finally:
        done.set()
        for thread in threads:
            thread.join(timeout=10)
        sys.setswitchinterval(interval)
    assert errors == []
    assert names <= {("edge-0", "edge-1", "edge-2"), ("edge-1", "edge-2")}
    assert roster.members()
    assert roster.version == 39


def test_a_server_knows_its_names_and_where_its_list_lies(tmp_path: Path, project: Any) -> None:
    identity = load_server_identity(project.server(tmp_path, "localhost", "10.0.0.5", "::1"))
    assert identity.hosts == ("localhost", "10.0.0.5", "::1")
    assert identity.port == 9092
    assert identity.roster_path == tmp_path / ROSTER
    assert identity.kit.role == "server"


def test_a_member_is_no_server(tmp_path: Path, project: Any) -> None:
    with pytest.raises(CertificateRefused, match="identity of the device 'edge-1', expected a ser"):
        load_server_identity(project.device(tmp_path))


def test_whether_a_member_is_in_force(now: datetime) -> None:
    member = Member("edge-1", "device", b"", "1", now, None, None)
    assert member.in_force(now + timedelta(minutes=10))
    assert not member.in_force(now + timedelta(minutes=11))
    assert not Member("edge-1", "device", b"", "1", now, None, now).in_force(now)


def test_a_list_that_was_rolled_back_is_refused_after_a_restart_too(
    tmp_path: Path, project: Any, keys: list[Any], entries: list[RosterEntry], now: datetime
) -> None:
    seen, public = tmp_path / SEEN, public_bytes(keys[0])

    def start() -> Roster:
        return Roster(tmp_path / ROSTER, pem(project.authority), seen=seen)

    write(tmp_path, project, 4, *entries)
    roster = start()
    assert roster.member(public) is not None
    write(tmp_path, project, 5, revoked(entries[0], now), *entries[1:])
    assert roster.member(public) is None
    assert seen_version(seen) == 5
    assert seen.stat().st_mode & 0o777 == 0o600

    write(tmp_path, project, 4, *entries)  # while it runs, and after it was started again
    assert roster.member(public) is None
    assert roster.damage is not None
    assert "version 4, but version 5 was in force" in roster.damage
    with pytest.raises(RollbackRefused, match="version 4, but version 5 was in force"):
        start()
    assert seen_version(seen) == 5

    write(tmp_path, project, 5, revoked(entries[0], now), *entries[1:])
    assert start().member(public) is None
    seen.unlink()  # what the message says to do where the newest is lost
    write(tmp_path, project, 4, *entries)
    assert start().member(public) is not None
    assert seen_version(seen) == 4


@pytest.mark.parametrize("raw", [b"", b"{}", b"7", b'{"version": 0}', b"\xff"])
def test_a_memory_that_cannot_be_read_stops_the_server(
    tmp_path: Path, project: Any, entries: list[RosterEntry], raw: bytes
) -> None:
    write(tmp_path, project, 4, *entries)
    (tmp_path / SEEN).write_bytes(raw)
    with pytest.raises(TrustError, match="does not state which version of the roster"):
        Roster(tmp_path / ROSTER, pem(project.authority), seen=tmp_path / SEEN)


def test_a_revocation_is_in_force_even_where_it_cannot_be_remembered(
    tmp_path: Path, project: Any, keys: list[Any], entries: list[RosterEntry], now: datetime
) -> None:
    (tmp_path / "file").write_text("in the way")
    write(tmp_path, project, 4, *entries)
    roster = Roster(tmp_path / ROSTER, pem(project.authority), seen=tmp_path / SEEN)
    roster._seen = tmp_path / "file" / SEEN  # as where the disk is full by now
    write(tmp_path, project, 5, revoked(entries[0], now), *entries[1:])
    assert roster.member(public_bytes(keys[0])) is None
    assert roster.damage is not None
    assert "cannot write this file" in roster.damage
