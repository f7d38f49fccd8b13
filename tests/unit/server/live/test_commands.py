"""The server's command line over devices: what it refuses, and what a stop says is kept."""

from __future__ import annotations

import argparse
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fedcore.config.run import RunConfig
from fedcore.errors import ConfigError, DataError
from server.live.commands import _stopped_text, start
from server.live.deployment import Deployment
from server.live.operators.commands import OPERATOR_VERBS


@pytest.mark.parametrize(
    ("last", "said"),
    [
        (0, "Stopped before the end of its first round. Kept in runs/trial: the started round."),
        (3, "Stopped after round 3 of 9. Kept in runs/trial: the model of that round and what dev"),
        (9, "Stopped after round 9 of 9. Kept in runs/trial: the model of its last round, and ea"),
    ],
)
def test_who_stops_a_server_is_told_what_is_kept_and_how_to_go_on(last: int, said: str) -> None:
    run = RunConfig.model_validate({"name": "trial", "task": "t.py", "federation": {"rounds": 9}})
    parser = argparse.ArgumentParser()
    start.arguments(parser)
    words = ["my run.toml", "--set", "seed=1", "--identity", "server", "--listen", "[::]:1"]
    told = _stopped_text(parser.parse_args([*words, "--fresh"]), last, run)
    assert told.startswith(said)
    again = "`fedcore server start 'my run.toml' --set seed=1 --identity server --runs runs "
    assert f"{again}--listen '[::]:1' --resume` continues" in told


@pytest.mark.parametrize("port", ["-1", "65536", "99999"])
def test_a_wake_port_is_a_port(tmp_path: Path, port: str) -> None:
    config = tmp_path / "run.toml"
    config.write_text('name = "trial"\ntask = "task.py"\nseed = 1\n')
    parser = argparse.ArgumentParser()
    start.arguments(parser)
    options = parser.parse_args([str(config), f"--wake-port={port}"])
    with pytest.raises(ConfigError, match=f"--wake-port {port}: expected a port"):
        start.run(options)


@pytest.mark.parametrize("there", [False, True])
def test_a_folder_without_an_identity_is_said_so(tmp_path: Path, there: bool) -> None:
    config, folder = tmp_path / "run.toml", tmp_path / "nope"
    config.write_text('name = "trial"\ntask = "task.py"\nseed = 1\n')
    if there:
        folder.mkdir()
    what = "this folder contains no kit.json" if there else "there is no such folder"
    for verb, arguments in ((start, [str(config)]), (OPERATOR_VERBS["status"], [])):
        parser = argparse.ArgumentParser()
        verb.arguments(parser)
        options = parser.parse_args([*arguments, "--identity", str(folder)])
        with pytest.raises(DataError, match=f"{what}.*`fedcore provision server HOST`") as caught:
            verb.run(options)
        assert str(folder) in str(caught.value)


def deployment(**ports: Any) -> Deployment:
    run = RunConfig(name="trial", task="task.py", seed=1)
    return Deployment(
        run=run, identity=Path("server"), host="::", runs=Path("runs"), json=False, **ports
    )


def test_devices_are_woken_on_the_port_after_where_there_is_one() -> None:
    identity: Any = SimpleNamespace(port=65534)
    assert deployment(port=None, wake_port=None).address(identity).wake_port == 65535
    assert deployment(port=0, wake_port=None).address(identity).wake_port == 0
    for port, provisioned in ((65535, 1), (None, 65535)):
        identity = SimpleNamespace(port=provisioned)
        with pytest.raises(ConfigError, match="choose a port with --wake-port"):
            deployment(port=port, wake_port=None).address(identity)
        assert deployment(port=port, wake_port=7).address(identity).wake_port == 7
