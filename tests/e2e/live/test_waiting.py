"""What operators ask while a round waits for its devices holds up nobody, and ends in time."""

from __future__ import annotations

import json
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedcore.errors import ConfigError, FedcoreError
from server.live.operators.client import SOCKET, ask_local, reachable
from server.live.operators.control import Control
from server.live.operators.protocol import Requester
from server.operator_log import verify_audit
from server.rounds.checkpointing.checkpointer import NoCheckpoints
from server.rounds.checkpointing.progress import Progress
from server.rounds.strategies.state import StrategyState
from tests.e2e.live.asking import status, wait_for


def audit(project: Any) -> list[tuple[str, str]]:
    path = project.root / "server" / "audit.jsonl"
    verify_audit(path)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [(line["action"], line["outcome"].partition(":")[0]) for line in lines]


@contextmanager
def asked(project: Any, file: Path) -> Iterator[socket.socket]:
    """A backup that was asked for, and that nobody has answered yet."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(20)
        with reachable(project.root / "server" / SOCKET) as path:
            connection.connect(path)
        connection.sendall(json.dumps({"verb": "backup", "file": str(file)}).encode() + b"\n")
        yield connection


@pytest.fixture
def stuck(project: Any, launch_server: Any, launch_device: Any) -> tuple[Any, Any]:
    """A server in the midst of a round whose only device has stopped, and that device."""
    server = launch_server("federation.rounds=100000", "federation.cohort=1")
    device = launch_device("edge-0")
    wait_for(lambda: status(project)["round"] >= 2, 60)
    device.send(signal.SIGSTOP)
    number = -1
    while number != (number := status(project)["round"]):
        time.sleep(0.5)
    return server, device


def test_backups_that_are_given_up_leave_the_round_alone(
    project: Any, stuck: tuple[Any, Any]
) -> None:
    server, device = stuck
    number = status(project)["round"]
    for each in range(12):  # more than any pool has threads
        with asked(project, project.root / f"{each}.tar"):
            time.sleep(0.02)  # and hung up
    device.send(signal.SIGCONT)
    wait_for(lambda: status(project)["round"] > number)
    server.send(signal.SIGTERM)
    assert server.end() == 130


def test_a_backup_that_waits_is_alone_and_ends_with_whoever_asked_or_the_run(
    project: Any, serve: Any
) -> None:
    run = project.run()
    control = Control(run, identity=project.root / "server", results=project.root / "runs")
    me, weights = Requester("me", "operator", True), np.zeros(3, np.float32)

    def ask(verb: str, gone: threading.Event | None = None, **more: str) -> Any:
        line = json.dumps({"verb": verb, **more}).encode()
        return control.threads.submit(control.answer, line, me, (gone or threading.Event()).is_set)

    def backup(name: str, gone: threading.Event | None = None) -> Any:
        waits = ask("backup", gone, file=str(project.root / name))
        with suppress(TimeoutError):
            waits.result(0.6)
        return waits

    with serve(run) as served:
        control.open(project.server(), served.listening)
        progress = Progress(0, False, weights, weights, 0, 0, StrategyState(None, ()), b"")
        # a round is on, and nobody is missing
        control.steered(NoCheckpoints()).wait_if_paused(progress)
        gone = threading.Event()
        first = backup("a.tar", gone)
        assert not first.done()
        assert "another one is being written" in backup("b.tar").result(0)["message"]
        for _ in range(8):
            assert ask("status").result(5)["state"] == "running"
        gone.set()
        assert "the operator disconnected" in first.result(5)["message"]
        second = backup("c.tar")
        assert ask("stop").result(5)["ok"]
        assert "the run 'trial' is ending" in second.result(5)["message"]
        assert ask("resume").result(5)["state"] == "stopping", "what is stopped stays so"
    control.close()
    assert audit(project)[-1] == ("end", "done")


def test_a_backup_that_waits_when_the_server_ends_is_answered_before_the_audit_is_closed(
    project: Any, serve: Any
) -> None:
    run = project.run()
    control = Control(run, identity=project.root / "server", results=project.root / "runs")
    weights = np.zeros(3, np.float32)
    with serve(run) as served:
        control.open(project.server(), served.listening)
        progress = Progress(0, False, weights, weights, 0, 0, StrategyState(None, ()), b"")
        control.steered(NoCheckpoints()).wait_if_paused(progress)
        line = json.dumps({"verb": "backup", "file": str(project.root / "a.tar")}).encode()
        waits = control.threads.submit(control.answer, line, Requester("me", "operator", True))
        wait_for(lambda: audit(project)[-1] == ("backup", "accepted"))
        control.close()
        assert waits.result(0)["error"] == "ResourceError"
    assert audit(project)[1:] == [("backup", "accepted"), ("backup", "refused"), ("end", "done")]
    told = control.answer(line, Requester("me", "operator", True))
    assert "still starting" in told["message"]


def test_a_backup_is_taken_and_a_stop_obeyed_while_a_round_lacks_devices(
    project: Any, stuck: tuple[Any, Any]
) -> None:
    server, device = stuck
    device.send(signal.SIGKILL)
    device.end()
    folder = project.root / "server"
    done = ask_local(folder, {"verb": "backup", "file": str(project.root / "b.tar")})
    assert Path(done["file"]).stat().st_size == done["bytes"]
    assert status(project)["state"] == "running"
    began = time.monotonic()
    ask_local(folder, {"verb": "stop"})
    assert server.end() == 130
    assert time.monotonic() - began < 10, "the deadline is 60 s"
    assert "RoundFailed" not in server.log.read_text()
    assert audit(project)[-2:] == [("stop", "accepted"), ("end", "done")]


def test_a_later_round_that_finds_too_few_devices_is_stopped(
    project: Any, launch_server: Any, launch_device: Any
) -> None:
    server = launch_server("federation.rounds=100000", "federation.cohort=1")
    device = launch_device("edge-0")
    folder = project.root / "server"
    wait_for(lambda: status(project)["round"] >= 2, 60)
    ask_local(folder, {"verb": "pause"})
    wait_for(lambda: status(project)["state"] == "paused")
    device.send(signal.SIGTERM)
    assert device.end() == 0
    ask_local(folder, {"verb": "resume"})
    wait_for(lambda: status(project)["state"] == "running")
    wait_for(lambda: "Missing: edge-0." in (status(project)["waits"] or ""), 30)
    ask_local(folder, {"verb": "backup", "file": str(project.root / "b.tar")})
    began = time.monotonic()
    ask_local(folder, {"verb": "stop"})
    assert server.end() == 130
    assert time.monotonic() - began < 5


def test_a_file_that_cannot_be_written_is_answered_and_noted(
    project: Any, launch_server: Any
) -> None:
    server = launch_server()
    wait_for(lambda: status(project)["state"] == "waiting")
    folder = project.root / "server"
    for name, kind in (
        ("missing/b.tar", ConfigError),
        ("b\0.tar", ConfigError),
        ("b" * 300, FedcoreError),
    ):
        with pytest.raises(kind, match=r"backup|no folder|absolute path"):
            ask_local(folder, {"verb": "backup", "file": str(project.root / name)})
        assert audit(project)[-1] == ("backup", "refused")
    assert "Traceback" not in server.log.read_text()


def test_a_second_signal_changes_nothing(project: Any, launch_server: Any) -> None:
    server = launch_server()
    wait_for(lambda: status(project)["state"] == "waiting")
    while server.process.poll() is None:
        server.send(signal.SIGTERM)
        time.sleep(0.05)
    assert server.end() == 130
    assert "Traceback" not in server.log.read_text()
    assert audit(project)[-1] == ("end", "done")


def test_a_signal_does_not_wait_for_a_backup_that_is_being_copied(
    project: Any, launch_server: Any
) -> None:
    server = launch_server()
    wait_for(lambda: status(project)["state"] == "waiting")
    with (project.root / "runs" / "trial" / "large").open("wb") as stream:
        stream.truncate(1 << 40)  # 1 TiB that takes no room, where it lies
    with asked(project, project.root / "b.tar") as connection:
        partial = "**/.backup.*/backup.tar"
        wait_for(lambda: [1 for path in project.root.glob(partial) if path.stat().st_size > 1e6])
        server.send(signal.SIGTERM)
        assert server.end() == 130
        told = json.loads(connection.makefile("rb").read())
    assert "the run 'trial' is ending. Nothing was written" in told["message"]
    assert [path.name for path in project.root.rglob("*.tar")] == []
    assert audit(project)[-3:] == [("backup", "accepted"), ("backup", "refused"), ("end", "done")]
