"""Operators at work: on the server's machine, over the network, and where they may not."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import httpx
import pytest

from fedcore.crypto.kit import client_context
from fedcore.errors import ConfigError, DataError, ResourceError, TrustError
from fedcore.task.definition import load_task
from fedcore.task.model import build_model, checkpoint_bytes
from server.live.operators.client import OPERATE, SOCKET, ask_local, ask_remote, reachable
from server.live.operators.protocol import MAX_REQUEST_BYTES
from server.operator_log import verify_audit
from tests.e2e.live.asking import status, wait_for


def audit(project: Any) -> list[dict[str, Any]]:
    path = project.root / "server" / "audit.jsonl"
    verify_audit(path)
    return [json.loads(line) for line in path.read_text().splitlines()]


def raw(project: Any, line: bytes) -> bytes:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(20)
        with reachable(project.root / "server" / SOCKET) as path:
            connection.connect(path)
        connection.sendall(line)
        with connection.makefile("rb") as stream:
            return stream.read()


def test_a_run_is_watched_paused_drained_backed_up_and_stopped(
    project: Any, launch_server: Any, launch_device: Any
) -> None:
    folder = project.root / "server"
    names = ("edge-0", "edge-1", "edge-2")
    for name in names:
        project.device(name)
    held_back = ("federation.holdout=0.3", "federation.evaluate_cohort=1")
    server = launch_server("federation.rounds=100000", "federation.cohort=2", *held_back)
    for name in names:
        launch_device(name)
    wait_for(lambda: status(project)["round"] >= 2 and status(project)["devices"]["there"] == 3, 60)
    said = status(project)
    assert (said["run"], said["state"], said["rounds"]) == ("trial", "running", 100_000)
    assert said["last"]["cohort"] == 2

    assert ask_local(folder, {"verb": "pause"})["state"] in ("pausing", "paused")
    wait_for(lambda: status(project)["state"] == "paused")
    number = status(project)["round"]
    backup = project.root / "b.tar"
    done = ask_local(folder, {"verb": "backup", "file": str(backup)})
    with tarfile.open(backup) as tar:
        assert "trial/run.json" in tar.getnames()
        assert len(tar.getnames()) == done["files"]
    model = project.root / "model.safetensors"
    model.write_bytes(checkpoint_bytes(build_model(load_task(project.task), project.run())))
    found = ask_local(folder, {"verb": "evaluate", "file": str(model)})
    by_device = found["evaluation"]["by_client"]
    assert [one["client"] for one in by_device] == [*names]
    assert all(0 <= one["metrics"]["accuracy"] <= 1 for one in by_device)
    assert (found["evaluation"]["clients_known"], found["evaluation"]["after_round"]) == (3, number)
    assert json.loads(Path(found["file"]).read_text()) == found["evaluation"]
    with pytest.raises(DataError, match=r"b\.tar"):
        ask_local(folder, {"verb": "evaluate", "file": str(backup)})
    assert status(project)["round"] == number, "a paused run began a round"
    assert ask_local(folder, {"verb": "resume"})["state"] == "running"
    wait_for(lambda: status(project)["round"] > number)

    assert ask_local(folder, {"verb": "drain", "device": "edge-1"}) == {
        "device": "edge-1",
        "drained": True,
    }
    drained = {one["name"]: one for one in ask_local(folder, {"verb": "devices"})["devices"]}
    assert [drained[name]["drained"] for name in names] == [False, True, False]
    assert drained["edge-1"]["there"]
    with pytest.raises(ConfigError, match="1 device would be left, and each round"):
        ask_local(folder, {"verb": "drain", "device": "edge-2"})
    with pytest.raises(ConfigError, match="no device of this project has this name"):
        ask_local(folder, {"verb": "drain", "device": "edge-9"})
    # The round that was on may have asked it still; those that follow do not.
    settled = status(project)["round"] + 1
    wait_for(lambda: status(project)["round"] > settled)
    log = project.root / "2.log"
    answered = log.read_text().count("trial train")
    wait_for(lambda: status(project)["round"] > settled + 5)
    assert log.read_text().count("trial train") == answered

    rounds = ask_local(folder, {"verb": "rounds"})["rounds"]
    assert [one["round"] for one in rounds[:3]] == [1, 2, 3]
    assert ask_local(folder, {"verb": "stop"})["state"] == "stopping"
    assert server.end() == 130
    told = server.log.read_text()
    assert re.search(r"Stopped after round \d+ of \d+\. Kept in .*--resume` continues", told)
    assert not (folder / SOCKET).exists()
    with pytest.raises(ResourceError, match="no server with this identity responds"):
        status(project)
    told = [(line["action"], line["outcome"].partition(":")[0]) for line in audit(project)]
    assert told == [
        ("start", "done"),
        ("pause", "accepted"),
        ("backup", "accepted"),
        ("backup", "done"),
        ("evaluate", "accepted"),
        ("evaluate", "done"),
        ("evaluate", "accepted"),
        ("evaluate", "refused"),
        ("resume", "accepted"),
        ("drain", "accepted"),
        ("drain", "refused"),
        ("drain", "refused"),
        ("stop", "accepted"),
        ("end", "done"),
    ]
    assert f"(uid {os.getuid()}, pid {os.getpid()})" in audit(project)[1]["by"]

    # The next server of this folder still leaves the drained device out, until that is undone.
    launch_server("federation.rounds=3", "federation.cohort=3", name="next")
    wait_for(lambda: status(project)["devices"]["there"] == 3, 60)
    assert status(project)["round"] == 0
    assert status(project)["devices"]["drained"] == 1
    ask_local(folder, {"verb": "drain", "device": "edge-1", "undo": True})
    wait_for(lambda: not (folder / SOCKET).exists(), 60)
    assert audit(project)[-1]["round"] == 3


def test_over_the_network_viewers_look_and_operators_steer(
    project: Any, launch_server: Any
) -> None:
    anna, bruno = project.device("anna", role="operator"), project.device("bruno", role="viewer")
    device = project.device("edge-0")
    server = launch_server()
    assert ask_remote(bruno, {"verb": "status"})["state"] == "waiting"
    assert [one["name"] for one in ask_remote(bruno, {"verb": "devices"})["devices"]] == ["edge-0"]
    for verb in ("pause", "resume", "stop"):
        with pytest.raises(TrustError, match=f"a viewer may only read, an operator may {verb}"):
            ask_remote(bruno, {"verb": verb})
    with pytest.raises(ConfigError, match="requested on the server's own machine"):
        ask_remote(anna, {"verb": "backup", "file": "/tmp/x.tar"})
    with pytest.raises(TrustError, match="HTTP 404"):
        ask_remote(device, {"verb": "status"})
    assert ask_remote(anna, {"verb": "pause"})["state"] == "pausing"
    project.revoke("anna")
    with pytest.raises(TrustError, match="HTTP 403"):
        ask_remote(anna, {"verb": "resume"})
    told = [(line["action"], line["by"].split(" ")[0]) for line in audit(project)]
    assert told[1:] == [
        ("pause", "bruno"),
        ("resume", "bruno"),
        ("stop", "bruno"),
        ("backup", "anna"),
        ("pause", "anna"),
    ]
    ask_local(project.root / "server", {"verb": "stop"})  # nothing has begun: it ends at once
    assert server.end() == 130


def test_whatever_else_is_asked_is_refused_and_changes_nothing(
    project: Any, launch_server: Any
) -> None:
    server = launch_server()
    wait_for(lambda: status(project)["state"] == "waiting")
    anna = project.device("anna", role="operator")
    lines = [
        b"\n",
        b"no json\n",
        b'{"verb": "destroy"}\n',
        b'{"verb": "pause", "more": 1}\n',
        b'{"verb": "drain"}\n',
        b'{"verb": "backup", "file": "relative.tar"}\n',
        b'{"verb": "backup", "file": "/etc/passwd"}\n',
        b"\xff\xfe\n",
        b"[" * 4000 + b"\n",
    ]
    for line in lines:
        answer = json.loads(raw(project, line))
        assert answer["ok"] is False, line
        assert answer["error"] == "ConfigError"
    assert raw(project, b"x" * (MAX_REQUEST_BYTES + 10) + b"\n") == b""
    url = anna.servers[0] + OPERATE
    with httpx.Client(verify=client_context(anna)) as client:
        assert client.post(url, content=b"x" * (MAX_REQUEST_BYTES + 1)).status_code == 413
        assert client.get(url).status_code == 404
        assert client.post(anna.servers[0] + "/v1/fleet/pull-messages").status_code == 404
        assert client.post(url, content=b"{").json()["error"] == "ConfigError"
    assert status(project)["state"] == "waiting"
    server.send(signal.SIGTERM)
    assert server.end() == 130


def test_the_socket_is_its_users_alone_and_a_killed_server_leaves_none_in_the_way(
    project: Any, launch_server: Any
) -> None:
    server = launch_server()
    path = project.root / "server" / SOCKET
    wait_for(lambda: status(project)["state"] == "waiting")
    assert path.stat().st_mode & 0o777 == 0o600
    server.send(signal.SIGKILL)
    server.end()
    assert path.exists()
    with pytest.raises(ResourceError, match="no server with this identity responds"):
        status(project)
    launch_server(name="second")
    wait_for(lambda: status(project)["run"] == "second")


def test_nothing_is_done_unrecorded_and_a_log_that_is_gone_stops_a_server(
    project: Any, launch_server: Any, fedcore: Any
) -> None:
    server, folder = launch_server(), project.root / "server"
    wait_for(lambda: status(project)["state"] == "waiting")
    (folder / "audit.jsonl").unlink()
    with pytest.raises(DataError, match="removed, replaced or truncated while the server runs"):
        ask_local(folder, {"verb": "pause"})
    assert status(project)["state"] == "waiting"
    server.send(signal.SIGTERM)
    assert server.end() == 4
    done = fedcore("server", "start", "run.toml", "--identity", "server", cwd=project.root)
    assert done.returncode == 4, done.stderr
    assert "the audit log is missing" in done.stderr
    (folder / "audit.mark").unlink()
    launch_server(name="second")
    audit(project)


def test_a_second_server_with_the_same_identity_is_refused(
    project: Any, launch_server: Any, fedcore: Any
) -> None:
    launch_server()
    address = ("--identity", "server", "--listen", "127.0.0.1:0")
    done = fedcore("server", "start", "run.toml", *address, cwd=project.root)
    assert done.returncode == 7, done.stderr
    assert "a server is running with this identity" in done.stderr
    assert status(project)["state"] == "waiting"


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become somebody else")
def test_another_user_is_refused_even_where_the_socket_is_open(
    project: Any, launch_server: Any
) -> None:
    launch_server()
    wait_for(lambda: status(project)["state"] == "waiting")
    with reachable(project.root / "server" / SOCKET) as path:
        Path(path).chmod(0o666)
        code = (
            "import os, socket, sys\n"
            "os.chdir(sys.argv[1]); os.setuid(65534)\n"
            "s = socket.socket(socket.AF_UNIX); s.connect('control.sock')\n"
            's.sendall(b\'{"verb": "stop"}\\n\'); print(s.makefile().read())\n'
        )
        done = subprocess.run(
            [sys.executable, "-c", code, str(project.root / "server")],
            capture_output=True,
            text=True,
        )
    assert "only the server's own user and root may connect" in done.stdout, done.stderr
    assert status(project)["state"] == "waiting"


def test_a_log_in_a_file_and_each_verb_on_the_command_line(
    project: Any, launch: Any, launch_server: Any
) -> None:
    launch_server()
    for verb, shown in (
        ("status", "Run:     trial, waiting"),
        ("rounds", "No round is complete yet."),
        ("devices", "The project has no devices yet."),
        ("pause", "trial: pausing"),
        ("resume", "trial: waiting"),
    ):
        program = launch(
            "server.live.commands:server",
            *("server", verb, "--identity", str(project.root / "server")),
        )
        assert program.end() == 0, program.log.read_text()
        assert shown in program.log.read_text()
