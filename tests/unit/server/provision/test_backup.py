from __future__ import annotations

import json
import stat
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from fedcore.crypto.roster import load_server_identity
from fedcore.crypto.roster_seen import SEEN, read_seen
from fedcore.crypto.sealing import decrypt, encrypt
from fedcore.errors import (
    CertificateRefused,
    ConfigError,
    DataError,
    FedcoreError,
    ResourceError,
    RollbackRefused,
    TrustError,
)
from server.doctor import _roster
from server.live.operators.drained import read_drained, write_drained
from server.live.operators.endpoint import server_lock
from server.operator_log import Audit, verify_audit
from server.provision.backup import backup, restore
from server.provision.issue import Act, revoke, sign_roster
from server.provision.membership import listing

PASSPHRASE = "five random words are good"


@pytest.fixture
def act(desk: Any) -> Act:
    desk.certify("edge-1")
    desk.certify("edge-2")
    return replace(desk.act, passphrase=PASSPHRASE)


@pytest.fixture
def file(act: Act, tmp_path: Path) -> Path:
    backup(act, tmp_path / "authority.sealed")
    return tmp_path / "authority.sealed"


def elsewhere(act: Act, tmp_path: Path) -> Act:
    return replace(act, folder=tmp_path / "new" / "authority")


def test_what_was_backed_up_works_elsewhere(act: Act, file: Path, tmp_path: Path) -> None:
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    new = elsewhere(act, tmp_path)
    done = restore(new, file, replace=False)
    assert (done.project, done.members, done.roster, done.before) == ("orchard", 2, "backup", None)
    assert listing(new).members == listing(act).members
    for name, mode in (("", 0o700), ("authority.key", 0o600), ("server/key.pem", 0o600)):
        assert stat.S_IMODE((new.folder / name).stat().st_mode) == mode
        assert (new.folder / name).exists()
    identity = load_server_identity(new.folder / "server", now=act.now)
    assert identity.roster_path.read_bytes() == (act.folder / "roster.json").read_bytes()
    revoke(new, "edge-1")  # the restored folder goes on
    assert '"action": "restore"' in (new.folder / "audit.jsonl").read_text()
    assert sorted(path.name for path in new.folder.parent.iterdir()) == ["authority"]


def test_a_backup_shows_nothing_without_its_passphrase(
    act: Act, file: Path, tmp_path: Path
) -> None:
    raw = file.read_bytes()
    for secret in ("PRIVATE KEY", "orchard", "edge-1"):
        assert secret.encode() not in raw
    wrong = replace(elsewhere(act, tmp_path), passphrase="five random words are bad")
    with pytest.raises(TrustError, match="decryption failed"):
        restore(wrong, file, replace=False)
    with pytest.raises(ConfigError, match="none was given"):
        restore(replace(wrong, passphrase=None), file, replace=False)
    assert not wrong.folder.exists()


def test_nothing_is_overwritten_unasked(act: Act, file: Path) -> None:
    before = {path: path.read_bytes() for path in act.folder.rglob("*") if path.is_file()}
    with pytest.raises(ConfigError, match="this file exists"):
        backup(act, file)
    with pytest.raises(ConfigError, match=r"expected an empty folder.*--replace"):
        restore(act, file, replace=False)
    assert {path: path.read_bytes() for path in act.folder.rglob("*") if path.is_file()} == before


def test_a_restore_lets_nobody_revoked_back_in(act: Act, file: Path) -> None:
    revoke(act, "edge-1")
    done = restore(replace(act, now=act.now + timedelta(hours=1)), file, replace=True)
    assert done.roster == "folder"
    states = {member.name: member.revoked_at for member in listing(act).members}
    assert states == {"edge-1": act.now, "edge-2": None}
    assert done.before is not None
    assert (done.before / "authority.key").exists()
    assert done.before.name == "authority.before-20260301T130000Z"
    lines = (act.folder / "audit.jsonl").read_text().splitlines()
    assert [json.loads(line)["action"] for line in lines[-3:]] == ["backup", "revoke", "restore"]


def test_another_authoritys_roster_gives_way_however_new(
    act: Act, file: Path, tmp_path: Path, desk: Any
) -> None:
    other = type(desk)(tmp_path / "other").begin()
    for number in range(4):
        other.certify(f"other-{number}")
    done = restore(replace(other.act, passphrase=PASSPHRASE), file, replace=True)
    assert done.roster == "backup"
    assert [member.name for member in listing(other.act).members] == ["edge-1", "edge-2"]


def test_a_damaged_authority_is_replaced_and_kept(act: Act, file: Path) -> None:
    (act.folder / "roster.json").write_text("garbage")
    (act.folder / "authority.key").unlink()
    done = restore(act, file, replace=True)
    assert done.roster == "backup"
    assert [member.name for member in listing(act).members] == ["edge-1", "edge-2"]
    assert done.before is not None
    assert (done.before / "roster.json").read_text() == "garbage"


def served(act: Act) -> Path:
    """The server's folder, once a server has run with it."""
    folder = act.folder / "server"
    load_server_identity(folder, now=act.now).roster()
    write_drained(folder, ["edge-2"])
    audit = Audit(folder / "audit.jsonl")
    audit.record(by="anna", action="drain", outcome="accepted")
    audit.close()
    return folder


def cut_roster(act: Act) -> None:
    (act.folder / "roster.json").write_text("{")


def no_certificate(act: Act) -> None:
    cut_roster(act)
    (act.folder / "authority.pem").unlink()


def nothing_tells(act: Act) -> None:
    no_certificate(act)
    (act.folder / "server" / "kit.json").unlink()


@pytest.mark.parametrize("damage", [cut_roster, no_certificate, nothing_tells])
def test_what_a_server_has_seen_outlives_a_damaged_authority(
    act: Act, file: Path, damage: Any
) -> None:
    revoke(act, "edge-1")
    folder = served(act)
    damage(act)
    done = restore(act, file, replace=True)
    assert done.caution is not None
    assert "version 4 of the roster was in force" in done.caution
    assert "revoke again" in done.caution
    revoke(act, "edge-2")  # the older list grows as new as the lost one, and is not that
    with pytest.raises(RollbackRefused, match="version 4 of the roster was in force"):
        load_server_identity(folder, now=act.now).roster()
    assert read_drained(folder) == {"edge-2"}
    assert verify_audit(folder / "audit.jsonl") == 1
    revoke(act, "edge-1")  # what the caution says
    (folder / "roster.seen").unlink()
    assert load_server_identity(folder, now=act.now).roster().version == 5


def test_versions_that_cannot_be_compared_are_told_of(act: Act, file: Path) -> None:
    revoke(act, "edge-1")  # no server has seen that
    cut_roster(act)
    done = restore(act, file, replace=True)
    assert done.caution is not None
    assert "could not be compared" in done.caution
    assert done.before is not None
    assert str(done.before / "audit.jsonl") in done.caution
    assert (
        restore(replace(act, now=act.now + timedelta(hours=1)), file, replace=True).caution is None
    )


def test_what_another_projects_server_has_seen_does_not_come_along(
    act: Act, file: Path, tmp_path: Path, desk: Any
) -> None:
    other = type(desk)(tmp_path / "other").begin()
    for number in range(4):
        other.certify(f"other-{number}")
    served(other.act)
    assert restore(replace(other.act, passphrase=PASSPHRASE), file, replace=True).caution is None
    assert {path.name for path in (other.folder / "server").iterdir()} == {
        "key.pem",
        "kit.json",
        "roster.json",
    }


def test_nothing_is_restored_over_a_running_server(act: Act, file: Path) -> None:
    served(act)
    with (
        server_lock(act.folder / "server"),
        pytest.raises(ResourceError, match=r"is running.*Nothing was restored"),
    ):
        restore(act, file, replace=True)
    assert restore(act, file, replace=True).before is not None


def test_what_is_no_file_in_the_servers_place_is_not_left_out(act: Act, file: Path) -> None:
    (served(act) / "roster.seen").unlink()
    (act.folder / "server" / "roster.seen").mkdir()
    with pytest.raises(DataError, match=r"roster\.seen: expected a file.*revoke them again"):
        restore(act, file, replace=True)


def test_a_damaged_authority_is_not_backed_up(act: Act, tmp_path: Path) -> None:
    (act.folder / "roster.json").write_text("garbage")
    with pytest.raises(TrustError, match="not a valid roster"):
        backup(act, tmp_path / "b")
    (act.folder / "roster.json").unlink()
    with pytest.raises(DataError, match=r"roster\.json"):
        backup(act, tmp_path / "b")
    assert not (tmp_path / "b").exists()


def altered(file: Path, **files: str | None) -> None:
    """Seals the backup again with some of its files changed or left out."""
    content = json.loads(decrypt(file.read_bytes(), PASSPHRASE, where="file"))
    for name, text in files.items():
        if text is None:
            del content["files"][name]
        else:
            content["files"][name] = text
    file.write_bytes(encrypt(json.dumps(content).encode(), PASSPHRASE))


@pytest.mark.parametrize(
    "files",
    [
        {"roster.json": None},
        {"authority.key": None},
        {"server/key.pem": None},
        {"roster.json": "Z2FyYmFnZQ=="},
        {"authority.key": "Z2FyYmFnZQ=="},
        {"authority.pem": "Z2FyYmFnZQ=="},
        {"server/kit.json": "Z2FyYmFnZQ=="},
        {"roster.json": "not base 64"},
        {"../outside": "Z2FyYmFnZQ=="},
        {"/tmp/outside": "Z2FyYmFnZQ=="},
    ],
    ids=str,
)
def test_what_does_not_fit_together_is_not_restored(
    act: Act, file: Path, tmp_path: Path, files: dict[str, str | None]
) -> None:
    altered(file, **files)
    new = elsewhere(act, tmp_path)
    with pytest.raises(TrustError):
        restore(new, file, replace=False)
    assert not new.folder.parent.exists()


def test_keys_of_two_authorities_are_not_mixed(
    act: Act, file: Path, tmp_path: Path, desk: Any
) -> None:
    other = type(desk)(tmp_path / "other").begin()
    other_file = tmp_path / "other.sealed"
    backup(replace(other.act, passphrase=PASSPHRASE), other_file)
    content = json.loads(decrypt(other_file.read_bytes(), PASSPHRASE, where="file"))["files"]
    for name, refused in (
        ("authority.key", "does not match the authority's certificate"),
        ("server/kit.json", "not issued by the authority"),
        ("server/key.pem", "belong to different servers"),
    ):
        mixed = tmp_path / "mixed.sealed"
        mixed.write_bytes(file.read_bytes())
        altered(mixed, **{name: content[name]})
        with pytest.raises(FedcoreError, match=refused):
            restore(elsewhere(act, tmp_path), mixed, replace=False)


def test_a_backup_has_a_limit(act: Act, tmp_path: Path) -> None:
    with (tmp_path / "huge").open("wb") as stream:
        stream.truncate(97 << 20)  # takes no room on disk
    with pytest.raises(DataError, match="more than the 100663296 allowed"):
        restore(elsewhere(act, tmp_path), tmp_path / "huge", replace=False)


def test_a_sealed_key_stays_sealed(bare: Any, tmp_path: Path) -> None:
    bare.act = replace(bare.act, passphrase=PASSPHRASE)
    bare.begin()
    backup(bare.act, tmp_path / "b")
    new = elsewhere(bare.act, tmp_path)
    restore(new, tmp_path / "b", replace=False)
    key = (new.folder / "authority.key").read_bytes()
    assert key == (bare.folder / "authority.key").read_bytes()
    assert b"PRIVATE" not in key


def test_a_stop_on_the_way_leaves_the_old_folder(
    act: Act, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path: path.read_bytes() for path in act.folder.rglob("*") if path.is_file()}

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("server.provision.backup.record", stop)
    with pytest.raises(KeyboardInterrupt):
        restore(act, file, replace=True)
    assert {path: path.read_bytes() for path in act.folder.rglob("*") if path.is_file()} == before
    assert sorted(path.name for path in act.folder.parent.iterdir()) == [
        "authority",
        "authority.sealed",
    ]


def test_the_authoritys_expiry_is_looked_at(act: Act, file: Path, tmp_path: Path) -> None:
    late = replace(elsewhere(act, tmp_path), now=act.now + timedelta(days=4000))
    with pytest.raises(CertificateRefused, match="expired"):
        restore(late, file, replace=False)


def test_an_older_list_that_comes_back_where_nothing_tells_of_a_newer_one_is_said_so(
    act: Act, file: Path, tmp_path: Path
) -> None:
    """Revoked after the backup, restored into a new folder: in force, and nobody overlooks it."""
    revoke(act, "edge-1")
    new = elsewhere(act, tmp_path)
    done = restore(new, file, replace=False)
    assert done.caution is not None
    assert "2026-03-01 12:00 UTC" in done.caution
    assert "revoked since then are in force again" in done.caution
    seen = read_seen(new.folder / "server" / SEEN)
    assert seen.restored == act.now
    identity = load_server_identity(new.folder / "server", now=act.now)
    assert identity.roster().version == seen.version
    assert read_seen(new.folder / "server" / SEEN).restored, "starting a server settles nothing"
    told = _roster(identity)
    assert (told.verdict, "was restored from a backup" in told.detail) == ("warn", True)
    revoke(new, "edge-1")
    assert identity.roster().version == seen.version + 1
    assert "was restored" not in _roster(identity).detail


def test_the_key_that_signs_rosters_comes_back_with_them(
    act: Act, file: Path, tmp_path: Path
) -> None:
    new = elsewhere(act, tmp_path)
    restore(new, file, replace=False)
    assert stat.S_IMODE((new.folder / "roster.key").stat().st_mode) == 0o600
    revoke(new, "edge-2")
    sign_roster(replace(act, passphrase=None))  # the old folder's key is newer than the backup's
    done = restore(replace(act, now=act.now + timedelta(hours=1)), file, replace=True)
    assert done.roster == "folder"
    revoke(act, "edge-1")
    assert [bool(one.revoked_at) for one in listing(act).members] == [True, False]
    assert verify_audit(act.folder / "audit.jsonl") == len(
        (act.folder / "audit.jsonl").read_text().splitlines()
    )
