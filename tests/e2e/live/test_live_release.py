"""From rounds over devices to a model that devices fetch: real processes, killed on the way."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fedcore.errors import INTERRUPTED, ConfigError
from server.live.operators.client import SOCKET, ask_local
from server.operator_log import verify_audit
from tests.e2e.live.asking import status, wait_for

CLOUD = '    cloud_data=lambda folder: data("cloud"),\n    example_input'

JUDGED = (
    'name = "trial"\ntask = "task.py"\n'
    "[federation]\nrounds = 2\ncohort = 2\nevaluate_cohort = 2\nholdout = 0.3\n"
    "[client]\nbatch_size = 8\n"
    "[finetune]\nepochs = 2\nevery = 1\nmax_metric_drop = 1.0\n"
    '[compression]\ncandidates = ["fp32"]\ntiming_runs = 100\n'
    '[release]\nrepository = "releases"\nkeys = "keys"\n'
)


def fedcore(root: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "fedcore.cli", *words],
        cwd=root,
        capture_output=True,
        text=True,
        timeout=120,
    )


def published(root: Path) -> list[dict[str, Any]]:
    done = fedcore(root, "release", "list", "--repository", "releases", "--keys", "keys", "--json")
    assert done.returncode == 0, done.stderr
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


def command(project: Any, *more: str) -> tuple[str, ...]:
    return (
        "server.live.commands:server",
        *("server", "start", "run.toml", "--identity", "server", "--json"),
        *("--listen", f"127.0.0.1:{project.port}", "--wake-port", "0", *more),
    )


def prepare_release(project: Any) -> None:
    """Gives the task data in the cloud, and makes a repository with its keys."""
    project.task.write_text(project.task.read_text().replace("    example_input", CLOUD))
    made = fedcore(project.root, "release", "init", "--repository", "releases", "--keys", "keys")
    assert made.returncode == 0


@pytest.mark.slow
def test_a_release_survives_kills_and_reaches_a_device(
    project: Any, launch: Any, launch_device: Any
) -> None:
    root = project.root
    prepare_release(project)
    (root / "run.toml").write_text(
        'name = "trial"\ntask = "task.py"\n'
        "[federation]\nrounds = 2\ncohort = 2\n[client]\nbatch_size = 8\n"
        "[finetune]\nepochs = 2\nmax_metric_drop = 1.0\n"
        '[compression]\ncandidates = ["fp32", "int8_dynamic"]\ntiming_runs = 100\n'
        '[release]\nrepository = "releases"\nkeys = "keys"\n'
    )
    for name in ("edge-0", "edge-1"):
        launch_device(name)

    server = launch(*command(project))
    server.wait_for('"stage_started"', 120)
    server.send(signal.SIGKILL)  # in fine-tuning
    server.end()
    assert published(root) == []
    refused = launch(*command(project))
    assert refused.end(60) == 2
    assert "this run was interrupted after round 2" in refused.log.read_text()

    server = launch(*command(project, "--resume"))
    server.wait_for('"stage": "compress"', 120)
    server.send(signal.SIGKILL)
    server.end()
    server = launch(*command(project, "--resume"))
    assert server.end(120) == 0, server.log.read_text()
    assert "listening on" not in server.log.read_text(), "the rounds were over"
    (release,) = published(root)
    assert release["version"] == 1

    again = launch(*command(project, "--resume"))
    assert again.end(60) == 0, "a service that comes up after it has not failed"
    assert "this run is complete: its results are in summary.json" in again.log.read_text()
    assert len(published(root)) == 1
    summary = json.loads((root / "runs" / "trial" / "summary.json").read_text())
    assert summary["release"]["version"] == 1
    assert summary["rounds"] == 2
    events = [json.loads(line) for line in (root / "runs/trial/metrics.jsonl").open()]
    assert [e["round"] for e in events if e["event"] == "round_finished"] == [1, 2]

    told = ("--model", "trial", "--store", "store")
    done = fedcore(
        root, "device", "update", "--repository", "releases", "--root", "keys/root.json", *told
    )
    assert done.returncode == 0, done.stderr
    (root / "input.json").write_text("[[0.0, 1.0, 0.0, 0.0, 0.0]]")
    done = fedcore(root, "device", "infer", *told[2:], *told[:2], "--input", "input.json", "--json")
    assert done.returncode == 0, done.stderr
    assert "outputs" in json.loads(done.stdout)


@pytest.mark.slow
def test_what_cannot_be_released_is_said_before_a_device_is_asked(
    project: Any, launch: Any
) -> None:
    (project.root / "run.toml").write_text(
        'name = "trial"\ntask = "task.py"\n[release]\nrepository = "releases"\nkeys = "keys"\n'
    )
    server = launch(*command(project))
    assert server.end(60) == 9, server.log.read_text()
    assert "listening on" not in server.log.read_text()
    assert not (project.root / "runs").exists()


@pytest.mark.slow
def test_what_follows_the_rounds_is_watched_stopped_and_gone_on_with(
    project: Any, launch: Any, launch_device: Any
) -> None:
    root, folder = project.root, project.root / "server"
    prepare_release(project)
    (root / "run.toml").write_text(
        'name = "trial"\ntask = "task.py"\n'
        "[federation]\nrounds = 2\n[client]\nbatch_size = 8\n"
        "[finetune]\nepochs = 10000\nmax_metric_drop = 1.0\n"
        '[compression]\ncandidates = ["fp32"]\ntiming_runs = 100\n'
        '[release]\nrepository = "releases"\nkeys = "keys"\n'
    )
    launch_device("edge-0")
    for resumed in (False, True):
        server = launch(*command(project, *(["--resume"] if resumed else [])))
        wait_for(lambda: status(project)["stage"] == "fine-tuning", 120)
        told = status(project)
        assert (told["state"], told["round"], told["listens"]) == ("finishing", 2, None)
        assert told["devices"] == {"members": 1, "there": 0, "drained": 0}
        shown = fedcore(root, "server", "status", "--identity", "server")
        assert "Run:     trial, finishing: fine-tuning; 2 of 2 rounds" in shown.stdout
        assert len(ask_local(folder, {"verb": "rounds"})["rounds"]) == 2
        for verb in ("pause", "resume", "drain", "backup"):
            with pytest.raises(
                ConfigError, match=rf"{verb}: the rounds of 'trial' are complete, devices"
            ):
                ask_local(folder, {"verb": verb, "device": "edge-0", "file": str(root / "b.tar")})
        assert ask_local(folder, {"verb": "stop"})["state"] == "stopping"
        assert server.end() == INTERRUPTED, server.log.read_text()
        assert "Traceback" not in server.log.read_text()
        assert not (folder / SOCKET).exists()
    verify_audit(folder / "audit.jsonl")
    lines = [json.loads(line) for line in (folder / "audit.jsonl").open()]
    refused = ["pause", "resume", "drain", "backup"]
    finished = ["finish", *refused, "stop", "end"]
    assert [line["action"] for line in lines] == ["start", "end", *finished, *finished]

    server = launch(*command(project, "--resume", "--set", "finetune.epochs=1"))
    assert server.end(120) == 0, server.log.read_text()
    assert [release["version"] for release in published(root)] == [1]


def judged(project: Any, launch: Any, launch_device: Any) -> tuple[list[Any], Any]:
    """Two devices, and a server whose gate asks them."""
    prepare_release(project)
    (project.root / "run.toml").write_text(JUDGED)
    devices = [launch_device(name) for name in ("edge-0", "edge-1")]
    return devices, launch(*command(project))


@pytest.mark.slow
def test_devices_judge_what_fine_tuning_gives(
    project: Any, launch: Any, launch_device: Any
) -> None:
    """The server lets them go after the rounds, and they come back to it."""
    devices, server = judged(project, launch, launch_device)
    server.wait_for('"stage_finished", "stage": "finetune"', 120)
    text = server.log.read_text()
    assert "round 1: fine-tuned on the cloud's data" in text
    assert text.count('"finetuned": true') == 1  # of two rounds
    assert "on held-out data of 2 clients" in text, text[-3000:]
    assert server.end(120) == 0
    assert len(published(project.root)) == 1
    for device in devices:
        assert device.process.poll() is None
        device.send(signal.SIGTERM)
        assert device.end() == 0


@pytest.mark.slow
def test_a_server_that_waits_for_judges_is_stopped_and_goes_on(
    project: Any, launch: Any, launch_device: Any
) -> None:
    devices, server = judged(project, launch, launch_device)
    server.wait_for('"stage": "finetune"', 120)
    for device in devices:
        device.send(signal.SIGKILL)
        device.end()
    server.wait_for("listening on", 60, times=2)
    server.send(signal.SIGTERM)
    assert server.end(30) == INTERRUPTED
    server = launch(*command(project, "--resume"))
    server.wait_for("listening on", 60)
    for name in ("edge-0", "edge-1"):
        launch_device(name)
    server.wait_for("on held-out data of 2 clients", 60)
    assert server.end(120) == 0
    assert len(published(project.root)) == 1
