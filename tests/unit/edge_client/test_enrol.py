from __future__ import annotations

import argparse
import json
import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.hashes import SHA256

from edge_client.client_commands import client
from edge_client.enrol import enrol, install_kit
from fedcore.crypto.certificates import MemberRole, certificate_sha256, pem
from fedcore.crypto.issue import issue_authority, issue_member, issue_server, read_request
from fedcore.crypto.keys import fingerprint, load_key, new_key, public_bytes, save_key
from fedcore.crypto.kit import KitFile, load_kit
from fedcore.errors import CertificateRefused, ConfigError, DataError

NOW = datetime.now(UTC).replace(microsecond=0)
AUTHORITY_KEY, OTHER_KEY = new_key(), new_key()
AUTHORITY = issue_authority(AUTHORITY_KEY, project="orchard", now=NOW)
SHA = certificate_sha256(AUTHORITY)
OTHER = issue_authority(OTHER_KEY, project="orchard", now=NOW)


def answer(
    folder: Path,
    *,
    name: str = "edge-1",
    role: MemberRole = "device",
    now: datetime = NOW,
    other: bool = False,
) -> Path:
    """The operator's answer to the key in a folder."""
    authority, key = (OTHER, OTHER_KEY) if other else (AUTHORITY, AUTHORITY_KEY)
    certificate = issue_member(
        load_key(folder / "key.pem").public_key(),
        name=name,
        role=role,
        authority=authority,
        authority_key=key,
        now=now,
    )
    return write(folder.parent / "sent.kit", certificate, authority)


def write(path: Path, certificate: Any, authority: Any) -> Path:
    kit = KitFile(
        servers=("https://localhost:9092",),
        certificate=pem(certificate).decode(),
        authority=pem(authority).decode(),
    )
    path.write_bytes(kit.to_bytes())
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    enrol(tmp_path / "kit", "edge-1")
    return tmp_path / "kit"


def put(folder: Path, file: Path, sha256: str | None = None) -> Any:
    return install_kit(folder, file, authority_sha256=sha256, now=NOW)


def test_the_key_is_made_here_and_only_the_request_leaves(tmp_path: Path) -> None:
    done = enrol(tmp_path / "kit", "edge-1")
    key = load_key(tmp_path / "kit" / "key.pem")
    assert stat.S_IMODE((tmp_path / "kit").stat().st_mode) == 0o700
    assert done.request == tmp_path / "kit" / "request.pem"
    assert done.fingerprint == fingerprint(public_bytes(key))
    request = read_request(done.request.read_bytes(), where="request")
    assert (request.name, request.public_key) == ("edge-1", key.public_key())
    assert b"PRIVATE" not in done.request.read_bytes()


def test_enrolling_again_keeps_the_key(folder: Path) -> None:
    before = (folder / "key.pem").read_bytes()
    (folder / "request.pem").unlink()
    enrol(folder, "edge-2")
    assert (folder / "key.pem").read_bytes() == before
    raw = (folder / "request.pem").read_bytes()
    assert read_request(raw, where="request").name == "edge-2"


def test_what_cannot_be_enrolled_is_said(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(ConfigError, match="expected 1 to 64"):
        enrol(tmp_path / "new", "../edge")
    assert not (tmp_path / "new").exists()
    (folder / "key.pem").write_text("garbage")
    with pytest.raises(CertificateRefused, match="expected an ECDSA private key"):
        enrol(folder, "edge-1")
    assert (folder / "key.pem").read_text() == "garbage"


def test_a_kit_is_installed_and_the_request_is_done_with(folder: Path) -> None:
    put(folder, answer(folder), certificate_sha256(AUTHORITY))
    assert load_kit(folder).name == "edge-1"
    assert sorted(path.name for path in folder.iterdir()) == ["key.pem", "kit.json"]
    with pytest.raises(ConfigError, match="an identity is installed in this folder already"):
        enrol(folder, "edge-1")


def test_a_fingerprint_may_be_written_as_openssl_does(folder: Path) -> None:
    sha256 = AUTHORITY.fingerprint(SHA256()).hex(":").upper()
    put(folder, answer(folder), sha256)
    assert load_kit(folder).role == "device"


def test_another_authority_than_the_one_told_is_refused(folder: Path) -> None:
    for wrong in (certificate_sha256(OTHER), "", "garbage", certificate_sha256(AUTHORITY)[:32]):
        with pytest.raises(
            CertificateRefused, match="does not come from the authority that you expect"
        ):
            put(folder, answer(folder), wrong)
    assert not (folder / "kit.json").exists()


def test_a_kit_for_another_key_is_refused(tmp_path: Path, folder: Path) -> None:
    enrol(tmp_path / "other", "edge-2")
    with pytest.raises(CertificateRefused, match="for another key than the one in"):
        put(folder, answer(tmp_path / "other"))
    with pytest.raises(DataError, match="there is no key in this folder"):
        put(tmp_path / "empty", answer(folder))
    assert not (folder / "kit.json").exists()


def test_a_servers_kit_is_refused(folder: Path) -> None:
    certificate = issue_server(
        load_key(folder / "key.pem").public_key(),
        hosts=["localhost"],
        authority=AUTHORITY,
        authority_key=AUTHORITY_KEY,
        now=NOW,
    )
    with pytest.raises(CertificateRefused, match="this is a server's kit"):
        put(folder, write(folder.parent / "sent.kit", certificate, AUTHORITY))


def test_a_renewed_kit_takes_the_place_of_an_expired_one(folder: Path) -> None:
    old = answer(folder, now=NOW)
    put(folder, old)
    later = NOW + timedelta(days=200)
    renewed = answer(folder, now=later)
    install_kit(folder, renewed, authority_sha256=None, now=later)
    assert load_kit(folder, now=later).not_after == later + timedelta(days=90)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"name": "edge-2"}, "enrol in another folder"),
        ({"role": "operator"}, "enrol in another folder"),
        ({"other": True}, "enrol in another folder"),
        ({"now": NOW - timedelta(minutes=5)}, "older than the one installed"),
        ({"now": NOW - timedelta(days=91)}, "expired"),
    ],
)
def test_what_does_not_follow_the_installed_kit_is_refused(
    folder: Path, changed: dict[str, Any], said: str
) -> None:
    put(folder, answer(folder))
    before = (folder / "kit.json").read_bytes()
    with pytest.raises(CertificateRefused, match=said):
        put(folder, answer(folder, **changed))
    assert (folder / "kit.json").read_bytes() == before


def test_a_swapped_key_installs_nothing(folder: Path) -> None:
    sent = answer(folder)
    save_key(folder / "key.pem", new_key())
    with pytest.raises(CertificateRefused, match="for another key"):
        put(folder, sent)


def run(*arguments: object) -> int:
    parser = argparse.ArgumentParser()
    client.arguments(parser)
    return client.run(parser.parse_args([*map(str, arguments)]))


def test_the_verbs_say_what_was_done(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "kit"
    assert run("enrol", "edge-1", "--kit", folder, "--json") == 0
    value = json.loads(capsys.readouterr().out)
    assert value["request"] == str(folder / "request.pem")
    sent = answer(folder)
    assert run("install", sent, "--kit", folder) == 0
    shown = capsys.readouterr().out
    assert "device edge-1 of project orchard" in shown
    assert "compare it with the operator's" in shown
    assert run("install", sent, "--kit", folder, "--json", "--authority", SHA) == 0
    assert json.loads(capsys.readouterr().out)["servers"] == ["https://localhost:9092"]


def test_enrolment_shows_no_private_key(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("enrol", "edge-1", "--kit", tmp_path / "kit")
    secret = (tmp_path / "kit" / "key.pem").read_text().splitlines()[1]
    shown = capsys.readouterr()
    assert secret not in shown.out + shown.err
