"""A start that is refused leaves the results of an earlier run of this name as they are."""

from __future__ import annotations

import signal
import socket
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedcore.errors import INTERRUPTED, ConfigError, ResourceError
from server.live.resume import open_run
from server.rounds.checkpointing.progress import Progress
from server.rounds.strategies.state import StrategyState


def begun(project: Any, *, ended: bool) -> Path:
    """The results of a run that has ended, or was interrupted."""
    weights = np.zeros(3, np.float32)
    with open_run(project.run(), project.root / "runs", resume=False, fresh=True) as (
        folder,
        journal,
    ):
        progress = Progress(0, ended, weights, weights, 0, 0, StrategyState(None, ()), b"")
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
        (
            "federation.initial=runs/trial/global.safetensors",
            "it is among the results of an earlier run",
        ),
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
    assert "cannot create this socket" in refused.log.read_text()
    assert contents(folder) == before


HANGING = """
def cloud(folder):
    print("cloud data are read", flush=True)
    while True:
        try:
            time.sleep(60)
        except BaseException:
            pass
"""


def hangs(project: Any) -> None:
    """Has reading the cloud's data never come to an end, whatever interrupts it."""
    text = project.task.read_text().replace("import torch\n", "import time\n\nimport torch\n", 1)
    text = text.replace("task = Task(", f"{HANGING}\n\ntask = Task(")
    project.task.write_text(text.replace("example_input=", "cloud_data=cloud, example_input="))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("goes_on", [False, True])
def test_the_second_signal_ends_a_server_whose_task_hangs(
    project: Any, launch: Any, number: signal.Signals, goes_on: bool
) -> None:
    hangs(project)
    if goes_on:  # the task's data are read while devices are let in
        begun(project, ended=False)
    server = start(launch, project, *(["--resume"] if goes_on else []))
    server.wait_for("cloud data are read")
    server.send(number)
    time.sleep(1.5)
    assert server.process.poll() is None
    server.send(number)
    assert server.end(5) == INTERRUPTED
    assert "stopped at once" in server.log.read_text()
    assert (project.root / "runs").exists() == goes_on


def test_the_clouds_data_are_read_once_where_a_run_begins(
    project: Any, launch: Any, launch_device: Any
) -> None:
    read = """
def cloud(folder):
    print("cloud data are read", flush=True)
    return data("cloud")
"""
    text = project.task.read_text().replace("task = Task(", f"{read}\n\ntask = Task(")
    project.task.write_text(text.replace("example_input=", "cloud_data=cloud, example_input="))
    project.device("edge-0")
    server = start(launch, project)
    server.wait_for("listening on")
    launch_device("edge-0")
    assert server.end(60) == 0, server.log.read_text()
    assert server.log.read_text().count("cloud data are read") == 1
