"""What is under deploy/ names verbs, options and exit codes that exist."""

from __future__ import annotations

import configparser
import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from edge_client.client_commands import client
from edge_client.commands import device
from fedcore import errors
from fedcore.cli import Command, _Parser
from server.commands.release_commands import release
from server.live.commands import server

DEPLOY = Path(__file__).parents[2] / "deploy"
UNITS = sorted(DEPLOY.glob("*.service"))
CONTAINERS = sorted(DEPLOY.glob("Containerfile.*"))
VERBS = {"client": client, "device": device, "server": server, "release": release}


def parse(words: list[str]) -> None:
    """As the command line does; raises what it raises."""
    command: Command = VERBS[words[1]]
    parser = _Parser(prog=f"fedcore {words[1]}")
    command.arguments(parser)
    parser.parse_args(words[2:])


def unit(path: Path) -> configparser.ConfigParser:
    parser = configparser.ConfigParser(interpolation=None, strict=False)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read_string(path.read_text())
    return parser


def test_there_is_one_of_each_for_either_side() -> None:
    assert [path.name for path in UNITS] == [
        "fedcore-device.service",
        "fedcore-models.service",
        "fedcore-releases.service",
        "fedcore-serve.service",
        "fedcore-server.service",
    ]
    assert [path.suffix for path in CONTAINERS] == [".device", ".server"]


@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.stem)
def test_a_unit_starts_a_command_that_parses(path: Path) -> None:
    words = shlex.split(unit(path)["Service"]["ExecStart"])
    assert words[0].endswith("/fedcore")
    parse(words)


@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.stem)
def test_a_unit_gives_up_on_exit_codes_that_mean_something(path: Path) -> None:
    known = {
        kind.exit_code
        for kind in vars(errors).values()
        if isinstance(kind, type) and issubclass(kind, errors.FedcoreError)
    } | {errors.INTERRUPTED}
    service = unit(path)["Service"]
    codes = {int(code) for code in service["RestartPreventExitStatus"].split()}
    assert errors.ConfigError.exit_code in codes <= known
    assert errors.ResourceError.exit_code not in codes, "a port or a disk may be free again"


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="needs systemd-analyze")
@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.stem)
def test_systemd_finds_nothing_wrong_with_a_unit(path: Path, tmp_path: Path) -> None:
    copy = tmp_path / path.name
    program = shutil.which("true")
    copy.write_text(re.sub(r"ExecStart=\S+", f"ExecStart={program}", path.read_text()))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(copy)], capture_output=True, text=True
    )
    told = [line for line in done.stderr.splitlines() if path.name in line or "Unknown" in line]
    assert told == []


@pytest.mark.parametrize("path", CONTAINERS, ids=lambda path: path.suffix)
def test_a_container_starts_a_command_that_parses_as_nobody_special(path: Path) -> None:
    text = path.read_text()
    (entry,) = re.findall(r"^ENTRYPOINT (.*)$", text, re.M)
    parse(json.loads(entry))
    assert re.search(r"^USER 10001$", text, re.M)
    for line in re.findall(r"fedcore-device (client .*)$", text.replace("\\\n#", " "), re.M):
        parse(["fedcore", *shlex.split(line)])
