"""The authority as an object: what ``fedcore provision`` does, in calls."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pytest

import fedcore
from fedcore.errors import ConfigError, TrustError
from server.live.operators.endpoint import server_lock
from server.provision.folder import locked
from server.provision.issue import Act

SECRET = "five random words are good"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_a_project_from_its_first_key_to_a_restored_backup(tmp_path: Path) -> None:
    authority = fedcore.create_authority("authority", "orchard", passphrase=SECRET)
    server = authority.add_server("localhost", port=9443)  # one name is one name, not its letters
    assert (server.role, server.servers) == ("server", ("https://localhost:9443",))
    assert server.path == Path("authority/server")
    made = fedcore.enrol("edge-1", "edge-1")
    sent = authority.add_device("edge-1", made.request, num_examples=600, days=30)
    assert (sent.path, sent.role) == (Path("edge-1.kit"), "device")
    assert 29 <= (sent.not_after - datetime.now(UTC)).days <= 30
    kit = fedcore.install_kit("edge-1", sent.path, authority_sha256=sent.authority_sha256)
    assert (kit.project, kit.name, kit.servers) == ("orchard", "edge-1", server.servers)
    assert kit.authority_sha256 == sent.authority_sha256 == authority.members().authority_sha256
    assert "PRIVATE" not in repr(kit)
    assert authority.add_operator("anna", kit="anna").path == Path("anna")
    assert authority.add_viewer("bruno", request=fedcore.enrol("b", "bruno").request).role == (
        "viewer"
    )
    assert authority.renew("server").path == server.path
    assert authority.sign_roster().signer == 2
    file = authority.backup("authority.sealed")
    assert authority.revoke("edge-1").revoked_at is not None
    with pytest.raises(TrustError):
        fedcore.restore_authority(file, "copy", passphrase="five other words are bad")
    done = fedcore.restore_authority(file, "copy", passphrase=SECRET)
    assert (done.project, done.members) == ("orchard", 3)
    copied = fedcore.Authority("copy").members()
    assert (copied.members[0].name, copied.members[0].num_examples) == ("edge-1", 600)
    assert copied.server is not None


def test_a_passphrase_is_never_shown() -> None:
    authority = fedcore.create_authority("authority", "orchard", passphrase=SECRET)
    act = Act(Path("authority"), "anna", datetime.now(UTC), SECRET)
    assert SECRET not in f"{authority!r} {authority} {act!r}"
    with pytest.raises(ConfigError, match="passphrase=") as caught:
        fedcore.Authority("authority").add_server(["localhost"])
    assert SECRET not in str(caught.value)


def test_a_mistake_issues_nothing() -> None:
    authority = fedcore.create_authority("authority", "orchard")
    authority.add_server(["localhost"])
    request = fedcore.enrol("edge-1", "edge-1").request
    for days in (0, 731, -5):
        with pytest.raises(ConfigError, match=f"days = {days}: expected 1 to 730"):
            authority.add_device("edge-1", request, days=days)
    with pytest.raises(ConfigError, match="got neither"):
        authority.add_operator("anna")
    with pytest.raises(ConfigError, match="got both"):
        authority.add_viewer("anna", kit="anna", request=request)
    with pytest.raises(ConfigError, match="there is no file to write"):
        authority.renew("server", out="server.kit")
    with pytest.raises(ConfigError, match="none was given"):
        authority.backup("authority.sealed")
    assert authority.members().members == ()
    assert {path.name for path in Path().iterdir()} == {"authority", "edge-1"}


def test_what_a_killed_process_left_half_written_goes_under_the_lock_that_guards_it() -> None:
    authority = fedcore.create_authority("authority", "orchard")
    authority.add_server("localhost")
    folder = Path("authority")
    theirs = {folder / ".bashrc.original"}
    servers = {folder / "server" / ".drained.json.abcdefgh"}
    for path in (folder / ".roster.json.abcdefgh", folder / "server" / ".key.pem.abcdefgh"):
        path.touch()
    for path in theirs | servers:
        path.touch()
    with locked(folder):
        assert {*folder.rglob(".*.*")} == theirs | servers
    with server_lock(folder / "server"):
        assert {*folder.rglob(".*.*")} == theirs
