from __future__ import annotations

import argparse
import json
import stat
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from fedcore.cli import Command
from fedcore.crypto.issue import make_request
from fedcore.crypto.keys import new_key
from fedcore.crypto.kit import KitFile, load_kit
from fedcore.errors import ConfigError, DataError, ResourceError
from server.provision.commands import provision
from server.provision.options import validity


def run(*arguments: object) -> int:
    parser = argparse.ArgumentParser()
    command: Command = provision
    command.arguments(parser)
    return command.run(parser.parse_args([*map(str, arguments)]))


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Each test in a folder of its own, with nothing in the environment."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FEDCORE_PASSPHRASE", raising=False)
    return tmp_path


@pytest.fixture
def begun(capsys: pytest.CaptureFixture[str]) -> None:
    run("init", "--project", "orchard")
    run("server", "localhost", "127.0.0.1")
    capsys.readouterr()


def said(capsys: pytest.CaptureFixture[str]) -> Any:
    return json.loads(capsys.readouterr().out)


def request(name: str) -> Path:
    path = Path(f"{name}.request")
    path.write_bytes(make_request(new_key(), name))
    return path


def test_init_says_what_comes_next(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("init", "--project", "orchard") == 0
    shown = capsys.readouterr().out
    assert "not encrypted" in shown
    assert "Next:      fedcore provision server HOST" in shown


def test_init_seals_when_there_is_a_passphrase(
    capsys: pytest.CaptureFixture[str], here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (here / "p").write_text("five random words are good\n")
    (here / "p").chmod(0o600)
    run("init", "--project", "orchard", "--passphrase-file", "p", "--json")
    value = said(capsys)
    assert value["sealed"] is True
    assert len(value["authority_sha256"]) == 64
    with pytest.raises(ConfigError, match="no terminal to ask for it"):
        run("server", "localhost")
    monkeypatch.setenv("FEDCORE_PASSPHRASE", "five random words are good")
    assert run("server", "localhost") == 0
    monkeypatch.setenv("FEDCORE_PASSPHRASE", "short")
    with pytest.raises(ConfigError, match="got 5 characters, expected 12"):
        run("init", "--project", "orchard", "--authority", "other")
    assert not (here / "other").exists()


def test_the_server_is_described(begun: None, capsys: pytest.CaptureFixture[str]) -> None:
    run("server", "fl.example", "--port", 443, "--days", 30, "--replace", "--json")
    value = said(capsys)
    assert value["servers"] == ["https://fl.example:443"]
    assert (value["name"], value["role"]) == ("server", "server")
    lasts = datetime.fromisoformat(value["not_after"]) - datetime.now().astimezone()
    assert 29 <= lasts.days <= 30
    run("renew", "server")
    assert "https://fl.example:443" in capsys.readouterr().out


@pytest.mark.parametrize("port", [0, -1, 65536, 99999])
def test_a_port_that_is_none_is_refused(begun: None, port: int) -> None:
    with pytest.raises(ConfigError, match=f"--port {port}: expected a port from 1 to 65535"):
        run("server", "fl.example", "--port", port, "--replace")


def test_an_address_of_ipv6_is_in_brackets(begun: None, capsys: pytest.CaptureFixture[str]) -> None:
    run("server", "::1", "--port", 65535, "--replace", "--json")
    assert said(capsys)["servers"] == ["https://[::1]:65535"]


def test_a_device_gets_a_kit(begun: None, capsys: pytest.CaptureFixture[str], here: Path) -> None:
    run("device", "edge-1", "--request", request("edge-1"), "--examples", 600)
    shown = capsys.readouterr().out
    assert "Next:    fedcore client install edge-1.kit --kit DIR --authority " in shown
    kit = KitFile.model_validate_json((here / "edge-1.kit").read_bytes())
    assert kit.servers == ("https://localhost:9092", "https://127.0.0.1:9092")
    run("list", "--json")
    value = said(capsys)
    assert value["authority_sha256"] in shown
    (row,) = value["members"]
    assert (row["name"], row["role"], row["state"], row["num_examples"]) == (
        "edge-1",
        "device",
        "in force",
        600,
    )


def test_a_kit_is_never_overwritten(begun: None, here: Path) -> None:
    (here / "edge-1.kit").write_text("precious")
    with pytest.raises(ConfigError, match=r"edge-1\.kit: this file exists"):
        run("device", "edge-1", "--request", request("edge-1"))
    run("device", "edge-1", "--request", request("edge-1"), "--out", "kits/edge-1")
    with pytest.raises(ConfigError, match=r"edge-1\.kit: this file exists"):
        run("renew", "edge-1")
    assert (here / "edge-1.kit").read_text() == "precious"
    run("renew", "edge-1", "--out", "again.kit")
    assert (here / "again.kit").read_bytes() != (here / "kits" / "edge-1").read_bytes()


@pytest.mark.parametrize("role", ["operator", "viewer"])
def test_a_person_on_this_machine_needs_one_step(
    begun: None, here: Path, role: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run(role, "anna", "--kit", "anna", "--json")
    assert said(capsys)["folder"] == "anna"
    kit = load_kit(here / "anna")
    assert (kit.name, kit.role) == ("anna", role)
    assert stat.S_IMODE((here / "anna").stat().st_mode) == 0o700
    with pytest.raises(ConfigError, match="expected an empty folder"):
        run(role, "bruno", "--kit", "anna")
    with pytest.raises(ConfigError, match="--out and --kit exclude"):
        run(role, "bruno", "--kit", "bruno", "--out", "bruno.kit")
    assert not (here / "bruno").exists()


def test_a_person_elsewhere_sends_a_request(begun: None, here: Path) -> None:
    run("viewer", "bruno", "--request", request("bruno"))
    assert (here / "bruno.kit").exists()


def test_a_refused_person_leaves_no_key(begun: None, here: Path) -> None:
    run("operator", "anna", "--kit", "anna")
    with pytest.raises(ConfigError, match="'anna' is taken"):
        run("viewer", "anna", "--kit", "again")
    assert not (here / "again").exists()


def test_revocation_and_the_list(begun: None, capsys: pytest.CaptureFixture[str]) -> None:
    run("operator", "anna", "--kit", "anna")
    run("viewer", "bruno", "--kit", "bruno")
    capsys.readouterr()
    run("revoke", "anna")
    assert "operator anna: revoked" in capsys.readouterr().out
    run("list")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("project orchard, authority valid until ")
    assert [line.split()[:3] for line in lines[1:]] == [
        ["server", "server", "valid"],
        ["anna", "operator", "revoked"],
        ["bruno", "viewer", "in"],
    ]
    run("revoke", "bruno", "--json")
    value = said(capsys)
    assert value["state"] == "revoked"
    assert value["revoked_at"] is not None


def test_backup_and_restore(
    begun: None,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    here: Path,
) -> None:
    with pytest.raises(ConfigError, match="a backup is encrypted with a passphrase"):
        run("backup", "b")
    monkeypatch.setenv("FEDCORE_PASSPHRASE", "five random words are good")
    run("backup", "b", "--json")
    assert said(capsys) == {"file": "b"}
    run("restore", "b", "--authority", "other")
    assert capsys.readouterr().out == "Restored: other, project orchard, 0 members\n"
    run("viewer", "bruno", "--kit", "bruno")
    capsys.readouterr()
    run("restore", "b", "--replace", "--json")
    value = said(capsys)
    assert (value["members"], value["roster"]) == (1, "folder")
    assert Path(value["before"]).parent == here


@pytest.mark.parametrize("verb", ["list", "renew x", "revoke x", "server localhost"])
def test_a_folder_without_an_authority_is_said(verb: str, here: Path) -> None:
    with pytest.raises(DataError, match="there is no authority in this folder"):
        run(*verb.split(), "--authority", "nowhere")
    assert not (here / "nowhere").exists()


@pytest.mark.parametrize("text", ["0", "-1", "731", "1e2", "", "²", "9" * 5000])
def test_days_are_a_whole_number_within_two_years(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="expected 1 to 730 days"):
        validity(text)
    assert validity("730") == 730


def nobody_certified(folder: Path, before: bytes) -> None:
    assert (folder / "authority" / "audit.jsonl").read_bytes() == before
    assert json.loads((folder / "authority" / "roster.json").read_text())["members"] == []


@pytest.mark.parametrize("place", ["a file/x.kit", "proc/x.kit", "n" * 248 + ".kit"])
def test_nobody_is_certified_whose_kit_can_be_put_nowhere(
    begun: None, here: Path, place: str
) -> None:
    (here / "a file").write_text("in the way")
    (here / "proc").symlink_to("/proc/self")  # where not even root makes files
    before = (here / "authority" / "audit.jsonl").read_bytes()
    file = request("edge-0")
    for role in ("device", "operator", "viewer"):
        with pytest.raises(ResourceError, match=r"No certificate was issued or recor"):
            run(role, "edge-0", "--request", file, "--out", place)
    if "/" in place:
        with pytest.raises(ResourceError, match="No certificate was issued"):
            run("operator", "anna", "--kit", Path(place).with_suffix(""))
    nobody_certified(here, before)
    assert run("device", "edge-0", "--request", file, "--out", "new/folder/x.kit") == 0
    assert (here / "new/folder/x.kit").is_file()
    before = (here / "authority" / "audit.jsonl").read_bytes()
    with pytest.raises(ResourceError, match="No certificate was issued"):
        run("renew", "edge-0", "--out", place)
    assert (here / "authority" / "audit.jsonl").read_bytes() == before


def test_no_server_is_certified_and_nothing_backed_up_where_it_cannot_be_put(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("init", "--project", "orchard")
    (here / "authority" / "server").write_text("in the way")
    before = (here / "authority" / "audit.jsonl").read_bytes()
    with pytest.raises(ResourceError, match="No certificate was issued"):
        run("server", "localhost")
    (here / "p").write_text("five random words are good\n")
    (here / "p").chmod(0o600)
    with pytest.raises(ResourceError, match="cannot create this file"):
        run("backup", "authority/server/b", "--passphrase-file", "p")
    nobody_certified(here, before)


@pytest.mark.usefixtures("begun")
def test_a_server_whose_kit_is_gone_is_told_of(
    capsys: pytest.CaptureFixture[str], here: Path
) -> None:
    (here / "authority" / "server" / "kit.json").unlink()
    assert run("list", "--json") == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out)["server"] is None
    assert "kit.json is missing: restore it" in shown.err
