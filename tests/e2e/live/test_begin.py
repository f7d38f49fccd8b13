"""A start that is refused leaves the results of an earlier run of this name as they are."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedcore.errors import ConfigError, ResourceError
from server.live.resume import open_run
from server.progress import Progress
from server.strategy_state import Remembered


def begun(project: Any, *, ended: bool) -> Path:
    """The results of a run that has ended, or was interrupted."""
    weights = np.zeros(3, np.float32)
    with open_run(project.run(), project.root / "runs", resume=False, fresh=True) as (
        folder,
        journal,
    ):
        progress = Progress(0, ended, weights, weights, 0, 0, Remembered(None, ()), b"")
        journal.commit(progress, None)
        if ended:
            journal.end()
        (folder / "global.safetensors").write_bytes(b"the best model")
    return Path(folder)


def start(launch: Any, project: Any, *arguments: str, wake_port: int = 0) -> Any:
    (project.root / "run.toml").write_text(
        'name = "trial"\ntask = "task.py"\nseed = 1\n'
        "[federation]\nrounds = 2\ndeadline_s = 30.0\n[client]\nbatch_size = 8\n"
    )
    return launch(
        "server.live.commands:server",
        *("server", "start", str(project.root / "run.toml")),
        *("--identity", str(project.root / "server")),
        *("--listen", f"127.0.0.1:{project.port}", "--wake-port", str(wake_port)),
        *("--runs", str(project.root / "runs"), *arguments),
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize(("which", "ended"), [("devices", True), ("wakes", False)])
def test_a_port_that_is_taken_costs_no_results(
    project: Any, launch: Any, which: str, ended: bool
) -> None:
    folder = begun(project, ended=ended)
    before = contents(folder)
    with socket.create_server(("127.0.0.1", project.port if which == "devices" else 0)) as taken:
        wake_port = taken.getsockname()[1] if which == "wakes" else 0
        fresh = () if ended else ("--fresh",)
        refused = start(launch, project, *fresh, wake_port=wake_port)
        assert refused.end(60) == ResourceError.exit_code
    text = refused.log.read_text()
    assert "Nothing was started" in text
    assert ("--wake-port" if which == "wakes" else "--listen") in text
    assert contents(folder) == before


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("federation.strategy=Nope", "Flower has no such strategy"),
        ("federation.initial=runs/trial/global.safetensors", "it lies among the results of a run"),
    ],
)
def test_rounds_that_could_not_begin_cost_no_results(
    project: Any, launch: Any, setting: str, said: str
) -> None:
    folder = begun(project, ended=True)
    before = contents(folder)
    refused = start(launch, project, "--set", setting)
    assert refused.end(60) == ConfigError.exit_code, refused.log.read_text()
    assert said in refused.log.read_text()
    assert contents(folder) == before


def test_a_socket_that_cannot_be_made_costs_no_results(project: Any, launch: Any) -> None:
    folder = begun(project, ended=True)
    before = contents(folder)
    (project.root / "server" / "control.sock").mkdir()
    refused = start(launch, project)
    assert refused.end(60) == ResourceError.exit_code
    assert "this socket cannot be made" in refused.log.read_text()
    assert contents(folder) == before
