from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from fedcore.errors import ConfigError, ReleaseError
from server.commands import release


def run(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    release.arguments(parser)
    return release.run(parser.parse_args(arguments))


@pytest.fixture
def places(tmp_path: Path) -> list[str]:
    return ["--repository", str(tmp_path / "r"), "--keys", str(tmp_path / "k")]


def test_init_says_what_goes_where(
    places: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("init", *places) == 0
    shown = capsys.readouterr().out
    assert f"{tmp_path}/k/offline" in shown
    assert f"{tmp_path}/k/root.json" in shown
    assert (tmp_path / "k" / "root.json").exists()


def test_list_rollback_and_refresh(
    places: list[str], tmp_path: Path, publisher: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    places = ["--repository", str(publisher.repository), "--keys", str(publisher.keys)]
    run("list", *places)
    assert capsys.readouterr().out == "nothing has been published yet\n"
    publisher.publish(b"one")
    publisher.publish(b"two")
    assert run("rollback", *places, "--model", "digits", "--to", "1", "--json") == 0
    assert json.loads(capsys.readouterr().out)["lineage"]["rollback_of"] == 1
    run("list", *places)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines] == [["digits", str(n)] for n in (1, 2, 3)]
    assert "rollback of 1" in lines[2]
    run("list", *places, "--json")
    assert [row["version"] for row in json.loads(capsys.readouterr().out)] == [1, 2, 3]
    assert run("refresh", *places, "--offline", "--json") == 0
    expiry = json.loads(capsys.readouterr().out)
    assert set(expiry) == {"root", "targets", "releases", "snapshot", "timestamp"}
    assert expiry["timestamp"] < expiry["releases"] < expiry["root"]
    run("refresh", *places)
    assert "timestamp expires " in capsys.readouterr().out


def test_a_model_that_init_names_is_bound(places: list[str], tmp_path: Path) -> None:
    run("init", *places, "--model", "digits", "--model", "letters")
    paths = json.loads((tmp_path / "r" / "metadata" / "1.targets.json").read_text())["signed"][
        "delegations"
    ]["roles"][0]["paths"]
    assert {path.split("/")[1] for path in paths} == {"digits", "letters"}


def test_rotate_says_what_is_new_and_what_to_destroy(
    publisher: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    places = ["--repository", str(publisher.repository), "--keys", str(publisher.keys)]
    for raw in (b"one", b"two"):
        publisher.publish(raw)
    assert run("rotate", *places, "--last-good", "digits=1") == 0
    shown = capsys.readouterr().out
    assert "New keys:   releases, snapshot, timestamp; devices switch" in shown
    assert f"New root:   version 2, {publisher.keys}/root.json" in shown
    assert "Epoch 1: digits" in shown
    assert f"Removed:    {publisher.keys}/online/releases.pem; destroy every copy" in shown
    assert run("rotate", *places, "--role", "offline", "--threshold", "root=2/3", "--json") == 0
    value = json.loads(capsys.readouterr().out)
    assert (value["root_version"], value["roles"]) == (3, ["root", "targets"])
    assert len(value["written"]) == 4
    assert run("rotate", *places, "--role", "root") == 0
    assert "Offline:    move" in capsys.readouterr().out


@pytest.mark.parametrize(
    "wrong",
    [
        ("--threshold", "root"),
        ("--threshold", "boot=1/1"),
        ("--threshold", "root=1"),
        ("--threshold", "root=x/2"),
        ("--threshold", "root=" + "9" * 5000 + "/3"),
        ("--last-good", "digits"),
        ("--last-good", "digits=x"),
        ("--role", "boot"),
    ],
)
def test_rotate_refuses_what_it_cannot_read(places: list[str], wrong: tuple[str, str]) -> None:
    with pytest.raises(ConfigError, match=wrong[0]):
        run("rotate", *places, *wrong)


def test_init_takes_thresholds(places: list[str], tmp_path: Path) -> None:
    with pytest.raises(ReleaseError, match="3 of 2 keys"):
        run("init", *places, "--threshold", "root=3/2")
    assert not (tmp_path / "k").exists()
    run("init", *places, "--threshold", "root=2/3", "--threshold", "targets=1/2")
    assert len(list((tmp_path / "k" / "offline").iterdir())) == 5
