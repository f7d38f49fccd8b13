from __future__ import annotations

import json
import os
import stat
import threading
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from fedcore.crypto.certificates import parse_certificate, subject_of
from fedcore.crypto.issue import make_request
from fedcore.crypto.keys import new_key, public_bytes
from fedcore.crypto.kit import KIT, load_kit
from fedcore.crypto.roster import Roster, load_server_identity
from fedcore.errors import (
    CertificateRefused,
    ConfigError,
    DataError,
    DiskFull,
    FedcoreError,
    TrustError,
)
from server.provision.folder import read_authority, read_key
from server.provision.issue import Act, initialise, renew, revoke
from server.provision.membership import listing

PASSPHRASE = "five random words are good"


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def roster_of(desk: Any) -> Roster:
    identity = load_server_identity(desk.folder / "server", now=desk.act.now)
    return Roster(identity.roster_path, identity.kit.authority_pem, clock=lambda: desk.act.now)


def audit(desk: Any) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (desk.folder / "audit.jsonl").read_text().splitlines()]


def test_an_authority_is_its_owners_alone(bare: Any) -> None:
    initialise(bare.act, "orchard")
    assert mode(bare.folder) == 0o700
    assert mode(bare.folder / "authority.key") == 0o600
    assert mode(bare.folder / "audit.jsonl") == 0o600
    authority = read_authority(bare.folder, now=bare.act.now)
    assert authority.project == "orchard"
    assert authority.certificate.public_key() == read_key(authority, None).public_key()


def test_nothing_is_overwritten(desk: Any) -> None:
    before = {path: path.read_bytes() for path in desk.folder.rglob("*") if path.is_file()}
    with pytest.raises(ConfigError, match="expected an empty folder"):
        initialise(desk.act, "vineyard")
    with pytest.raises(ConfigError, match="the server already has an identity"):
        desk.server("localhost")
    assert {path: path.read_bytes() for path in desk.folder.rglob("*") if path.is_file()} == before


def test_a_sealed_key_signs_with_its_passphrase_alone(bare: Any) -> None:
    act = Act(bare.folder, "anna@desk", bare.act.now, PASSPHRASE)
    initialise(act, "orchard")
    assert b"PRIVATE KEY" not in (bare.folder / "authority.key").read_bytes()
    with pytest.raises(ConfigError, match="encrypted with a passphrase, but none was given"):
        bare.server("localhost")
    wrong = Act(bare.folder, "anna@desk", bare.act.now, "five random words are bad")
    with pytest.raises(TrustError, match="the passphrase is wrong"):
        read_key(read_authority(bare.folder, now=bare.act.now), wrong.passphrase)
    bare.act = act
    assert bare.server("localhost").servers == ("https://localhost:9092",)
    bare.certify("edge-1")
    bare.act = Act(bare.folder, "anna@desk", act.now)
    assert revoke(bare.act, "edge-1").revoked_at == act.now  # in a hurry, without the passphrase


def test_a_device_is_certified_and_known_to_the_server(desk: Any, tmp_path: Path) -> None:
    roster = roster_of(desk)
    kit = load_kit(desk.holder(tmp_path / "kit", "edge-1"), now=desk.act.now)
    assert (kit.project, kit.name, kit.role) == ("orchard", "edge-1", "device")
    assert kit.servers == ("https://localhost:9092",)
    member = roster.member(kit.public)
    assert member is not None
    assert (member.name, member.role, member.num_examples) == ("edge-1", "device", None)


@pytest.mark.parametrize("role", ["device", "operator", "viewer"])
def test_each_role_is_the_operators_word(desk: Any, role: str) -> None:
    desk.certify("anna", role, num_examples=600)
    (member,) = listing(desk.act).members
    assert (member.role, member.num_examples) == (role, 600)


@pytest.mark.parametrize("num_examples", [0, -9, 1_000_001, 10**12])
def test_no_weight_passes_its_cap(desk: Any, num_examples: int) -> None:
    with pytest.raises(ConfigError, match="expected 1 to 1000000, the largest weight of a client"):
        desk.certify("edge-1", num_examples=num_examples)
    assert listing(desk.act).members == ()


def test_a_request_for_a_name_that_is_taken_is_refused(desk: Any) -> None:
    desk.certify("edge-1")
    for name in ("edge-1", "server"):
        with pytest.raises(ConfigError, match=f"'{name}' is taken.*revoke the member that has it"):
            desk.certify(name)
    assert len(listing(desk.act).members) == 1


def test_an_expired_member_still_has_its_name(desk: Any) -> None:
    desk.certify("edge-1")
    later = desk.at(desk.act.now + timedelta(days=200))
    with pytest.raises(ConfigError, match="'edge-1' is taken"):
        desk.certify("edge-1", act=later)


def test_one_key_is_one_identity(desk: Any) -> None:
    key = new_key()
    desk.certify("edge-1", key=key)
    with pytest.raises(ConfigError, match="has a certificate already, for 'edge-1'"):
        desk.certify("edge-2", key=key)
    revoke(desk.act, "edge-1")
    for name in ("edge-1", "edge-2"):
        with pytest.raises(ConfigError, match=r"was revoked, for 'edge-1'.*enrol with a new key"):
            desk.certify(name, key=key)


def test_a_request_of_another_name_is_not_certified_under_this_one(desk: Any) -> None:
    with pytest.raises(ConfigError, match="made by 'edge-2', expected 'edge-1'"):
        desk.certify("edge-1", request=make_request(new_key(), "edge-2"))


@pytest.mark.parametrize("name", ["../edge", "/tmp/edge", "edge/1", "", "Edge"])
def test_a_name_that_could_be_a_path_is_refused(desk: Any, name: str) -> None:
    before = sorted(desk.folder.parent.rglob("*"))
    with pytest.raises(ConfigError, match="expected"):
        desk.certify(name, request=make_request(new_key(), "edge-1"))
    assert sorted(desk.folder.parent.rglob("*")) == before


def test_there_is_no_kit_before_there_is_a_server(bare: Any) -> None:
    initialise(bare.act, "orchard")
    with pytest.raises(ConfigError, match="run `fedcore provision server HOST` first"):
        bare.certify("edge-1")


def test_revocation_reaches_a_running_server(desk: Any, tmp_path: Path) -> None:
    kits = [load_kit(desk.holder(tmp_path / n, n), now=desk.act.now) for n in ("edge-1", "edge-2")]
    roster = roster_of(desk)
    assert roster.member(kits[0].public) is not None
    revoke(desk.act, "edge-1")
    assert roster.member(kits[0].public) is None
    assert roster.member(kits[1].public) is not None
    with pytest.raises(ConfigError, match="no member in force is named 'edge-1'"):
        revoke(desk.act, "edge-1")
    with pytest.raises(ConfigError, match="no member in force is named 'edge-1'"):
        desk.renew("edge-1", desk.act.now)


def test_the_server_is_not_revoked_but_replaced(desk: Any) -> None:
    before = (desk.folder / "roster.json").read_bytes()
    with pytest.raises(ConfigError, match=r"not a member.*provision server HOST --replace"):
        revoke(desk.act, "server")
    assert (desk.folder / "roster.json").read_bytes() == before


def test_what_is_lost_is_told_with_what_brings_it_back(desk: Any) -> None:
    for name in ("roster.json", "authority.key", "audit.jsonl"):
        path = desk.folder / name
        raw = path.read_bytes()
        path.unlink()
        os.mkfifo(path)
        with pytest.raises(
            DataError, match=r"Nothing was done[;,].*(restore FILE|restore the log)"
        ):
            desk.certify("edge-1")
        path.unlink()
        path.write_bytes(raw)
    desk.certify("edge-1")


def test_a_revoked_name_may_enrol_again_with_a_new_key(desk: Any) -> None:
    desk.certify("edge-1", num_examples=600)
    revoke(desk.act, "edge-1")
    desk.certify("edge-1")
    old, new = listing(desk.act).members
    assert old.revoked_at is not None
    assert new.revoked_at is None
    assert new.num_examples is None
    assert [member.name for member in roster_of(desk).members()] == ["edge-1"]


def test_renewal_keeps_key_weight_and_place(desk: Any, tmp_path: Path) -> None:
    desk.certify("edge-1", num_examples=600)
    desk.certify("edge-2")
    before = listing(desk.act).members[0]
    roster = roster_of(desk)
    later = desk.act.now + timedelta(days=80)
    desk.renew("edge-1", later)
    after = listing(desk.act).members[0]
    assert (after.public, after.num_examples, after.role) == (before.public, 600, "device")
    assert after.serial != before.serial
    assert after.not_after == later + timedelta(days=90)
    member = roster.member(before.public)
    assert member is not None
    assert member.serial == after.serial


def test_an_expired_member_is_renewed_without_a_new_request(desk: Any) -> None:
    desk.certify("edge-1")
    later = desk.act.now + timedelta(days=200)
    assert not listing(desk.act).members[0].in_force(later)
    desk.renew("server", later)
    desk.renew("edge-1", later)
    assert listing(desk.act).members[0].in_force(later)


def test_the_servers_certificate_is_renewed_in_place(desk: Any) -> None:
    before = load_server_identity(desk.folder / "server", now=desk.act.now)
    later = desk.act.now + timedelta(days=80)
    desk.renew("server", later)
    after = load_server_identity(desk.folder / "server", now=later)
    assert after.hosts == before.hosts
    assert after.kit.public == before.kit.public
    assert after.kit.not_after == later + timedelta(days=90)


def test_the_server_is_replaced_when_that_is_asked_for(desk: Any) -> None:
    before = load_server_identity(desk.folder / "server", now=desk.act.now)
    desk.server("fl.example", "10.0.0.5", "::1", again=True)
    after = load_server_identity(desk.folder / "server", now=desk.act.now)
    assert after.hosts == ("fl.example", "10.0.0.5", "::1")
    assert after.kit.servers[2] == "https://[::1]:9092"
    assert after.kit.public != before.kit.public
    assert desk.certify("edge-1").servers == after.kit.servers


@pytest.mark.parametrize(
    "hosts", [(), ("https://fl.example",), ("fl.example:9092",), ("a b",), ("fe80::1%eth0",)]
)
def test_what_is_no_host_makes_no_server(bare: Any, hosts: tuple[str, ...]) -> None:
    initialise(bare.act, "orchard")
    with pytest.raises(ConfigError, match="expected"):
        bare.server(*hosts)
    assert not (bare.folder / "server").exists()


def test_every_act_is_recorded_with_who_and_when(desk: Any) -> None:
    desk.certify("edge-1")
    desk.renew("edge-1", desk.act.now + timedelta(days=1))
    revoke(desk.at(desk.act.now + timedelta(days=2)), "edge-1")
    entries = audit(desk)
    assert [(entry["action"], entry.get("name")) for entry in entries] == [
        ("init", None),
        ("issue", "server"),
        ("issue", "edge-1"),
        ("renew", "edge-1"),
        ("revoke", "edge-1"),
    ]
    assert {entry["by"] for entry in entries} == {"anna@desk"}
    assert [entry["at"][:10] for entry in entries[2:]] == ["2026-03-01", "2026-03-02", "2026-03-03"]
    (member,) = listing(desk.act).members
    assert entries[4]["serial"] == entries[3]["serial"] == member.serial != entries[2]["serial"]
    assert entries[4]["fingerprint"] == member.fingerprint


def test_of_many_at_once_none_is_lost(desk: Any) -> None:
    threads = [threading.Thread(target=desk.certify, args=(f"edge-{n}",)) for n in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert sorted(member.name for member in roster_of(desk).members()) == sorted(
        f"edge-{n}" for n in range(12)
    )


def test_a_line_that_a_power_cut_left_unfinished_spoils_no_other(desk: Any) -> None:
    path = desk.folder / "audit.jsonl"
    path.write_text(path.read_text() + '{"at": "2026-03-')
    desk.certify("edge-1")
    lines = path.read_text().splitlines()
    assert lines[-2] == '{"at": "2026-03-'
    assert json.loads(lines[-1])["name"] == "edge-1"


@pytest.mark.parametrize("fails", ["roster.json", "audit.jsonl"])
def test_a_certificate_that_could_not_be_recorded_is_not_issued(
    desk: Any, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    def full(*_: object, **__: object) -> None:
        raise DiskFull("no room")

    name = "write_roster" if fails == "roster.json" else "record"
    monkeypatch.setattr(f"server.provision.issue.{name}", full)
    with pytest.raises(DiskFull):
        desk.certify("edge-1")
    monkeypatch.undo()
    assert listing(desk.act).members == ()
    desk.certify("edge-1")


def test_a_folder_without_an_authority_is_said(bare: Any) -> None:
    for use in (
        lambda: listing(bare.act),
        lambda: revoke(bare.act, "edge-1"),
        lambda: renew(bare.act, "edge-1", validity=timedelta(days=1)),
    ):
        with pytest.raises(DataError, match=r"no authority in this folder.*fedcore provision init"):
            use()
    assert not bare.folder.exists()


def test_a_swapped_key_signs_nothing(desk: Any, tmp_path: Path) -> None:
    other = type(desk)(tmp_path / "other").begin()
    (other.folder / "authority.key").replace(desk.folder / "authority.key")
    with pytest.raises(CertificateRefused, match="does not match the authority's certificate"):
        desk.certify("edge-1")


def test_a_roster_that_someone_changed_is_refused(desk: Any, tmp_path: Path) -> None:
    other = type(desk)(tmp_path / "other").begin()
    other.certify("mallory")
    (other.folder / "roster.json").replace(desk.folder / "roster.json")
    with pytest.raises(FedcoreError, match="signature is invalid"):
        desk.certify("edge-1")


def test_a_kit_holds_no_secret(desk: Any) -> None:
    key = new_key()
    file = desk.certify("edge-1", key=key)
    assert b"PRIVATE" not in file.to_bytes()
    certificate = parse_certificate(file.certificate.encode(), where="kit")
    authority = parse_certificate(file.authority.encode(), where="kit")
    assert subject_of(certificate, authority, where="kit").public == public_bytes(key)


def test_the_servers_folder_shows_the_authoritys_roster(desk: Any, tmp_path: Path) -> None:
    link = desk.folder / "server" / "roster.json"
    assert link.is_symlink()
    desk.folder.rename(tmp_path / "moved")
    moved = tmp_path / "moved" / "server"
    assert (moved / "roster.json").read_bytes() == (moved.parent / "roster.json").read_bytes()
    assert (moved / KIT).exists()
