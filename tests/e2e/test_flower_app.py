"""The example under ``examples/flower_app``, run by Flower's own command line and simulation."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

import pytest
import tomli_w
import torch

from fedcore.client_app import client_app
from fedcore.config.owner import OPEN_POLICY
from fedcore.config.run import RunConfig
from fedcore.config.settings import load_run
from fedcore.privacy.accounting import epsilon_of
from fedcore.privacy.ledger import read_ledger
from fedcore.privacy.planning import plan
from fedcore.seeds import Simulated
from fedcore.task.definition import Task, load_task
from fedcore.task.metrics import ACCURACY
from fedcore.task.model import build_model, checkpoint_bytes, load_checkpoint
from fedcore.training.evaluate import evaluate
from server.cloud import read_cloud_data
from server.rounds.app import Listener, Outcome, server_app
from server.simulation.engine import SimulatedClients, simulate

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
APP = ROOT / "examples" / "flower_app"
BIN = Path(sys.executable).parent
START_S, RUN_S, END_S = 60, 200, 20


@contextmanager
def superlink(home: Path, scratch: Path) -> Iterator[dict[str, str]]:
    """A SuperLink of Flower's own on a free port; gives the environment that reaches it.

    Whatever works in ``home`` is one of its processes: none may outlive it.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    home.mkdir()
    connection = {"address": address, "insecure": True}
    (home / "config.toml").write_text(tomli_w.dumps({"superlink": {"here": connection}}))
    environment = {
        **os.environ,
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",  # it starts its own programs by name
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "RAY_TMPDIR": str(scratch),
        "RAY_USAGE_STATS_ENABLED": "0",
        "OMP_NUM_THREADS": "1",
    }
    listen = ("--host", "127.0.0.1", "--port", address.rpartition(":")[2])
    with (home / "superlink.log").open("wb") as said:
        process = subprocess.Popen(
            [BIN / "flower-superlink", "--insecure", "--simulation", *listen],
            cwd=home,
            env=environment,
            stdout=said,
            stderr=subprocess.STDOUT,
        )
    try:
        wait_for(f"http://{address}/health", process)
        assert process.pid in running(home)
        yield environment
        assert process.poll() is None, (home / "superlink.log").read_text()
    finally:
        process.terminate()
        left = outlived(process, home)
    assert not left, f"Flower left processes: {left}"


def wait_for(url: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urlopen(url, timeout=1):
                return
        except (URLError, TimeoutError):
            time.sleep(0.1)
    raise AssertionError(f"{url} does not answer; the SuperLink's exit code is {process.poll()}")


def outlived(process: subprocess.Popen[bytes], home: Path) -> dict[int, str]:
    """What still runs some seconds after the SuperLink was told to end; it is killed then."""
    deadline = time.monotonic() + END_S
    while (left := running(home)) and time.monotonic() < deadline:
        process.poll()
        time.sleep(0.1)
    for pid in left:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    process.wait(timeout=END_S)
    return left


def running(home: Path) -> dict[int, str]:
    """Command lines of the processes that work in ``home``; Ray's rewrite their environment."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if (folder / "cwd").readlink() == home:
                line = (folder / "cmdline").read_bytes().replace(b"\0", b" ")
                found[int(folder.name)] = line.decode(errors="replace")
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue  # it ended meanwhile, or is another user's
    return found


def flwr_run(environment: Mapping[str, str], runs: Path, run: Path, *, nodes: int) -> str:
    """Types ``flwr run`` and gives what it printed until the run was over."""
    done = subprocess.run(
        [
            *(BIN / "flwr", "run", APP, "here", "--stream"),
            *("--run-config", f"run={json.dumps(str(run))} runs={json.dumps(str(runs))}"),
            *("--federation-config", f"num-supernodes={nodes} client-resources-num-cpus=1"),
        ],
        cwd=run.parent,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=RUN_S,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def in_process(task: Task, run: RunConfig) -> tuple[Outcome, SimulatedClients]:
    """The same run over fedcore's own engine, on one thread, as Ray gives each client one."""
    outcomes: list[Outcome] = []
    randomness = Simulated(run.seed)
    cloud = read_cloud_data(task, None, holdout=run.finetune.holdout, seed=run.seed)
    listener = Listener(on_note=print, on_round=print, on_end=outcomes.append)
    server = server_app(task, run, cloud=cloud, randomness=randomness, listener=listener)
    client = client_app(task, run, owner=OPEN_POLICY, randomness=randomness)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        simulation = simulate(server, client, task.clients(None))
    finally:
        torch.set_num_threads(threads)
    return outcomes[0], simulation


def epsilons(task: Task, run: RunConfig, rounds: int) -> list[float]:
    """What each client has spent after some rounds, from the sizes of their data alone."""
    assert run.privacy.participations is not None
    charges = [
        plan(
            task.client_data(name, None),
            run.client,
            run.privacy,
            round=1,
            participations=run.privacy.participations,
        ).charge
        for name in task.clients(None)
    ]
    delta, accountant = run.privacy.target_delta, run.privacy.accountant
    return [epsilon_of([c] * rounds, target_delta=delta, accountant=accountant) for c in charges]


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_stock_flower_trains_what_our_own_engine_trains(tmp_path: Path) -> None:
    # One round more than any client's budget lasts. A client whose ledger did not outlive a round
    # would train in it; that none does is what shows that every client's did.
    values = tomllib.loads((APP / "run.toml").read_text())
    lasts = values["federation"]["rounds"]
    values["federation"]["rounds"] = lasts + 1
    values["privacy"]["participations"] = lasts
    values["task"] = str((APP / values["task"]).resolve())
    config = tmp_path / "run.toml"
    config.write_text(tomli_w.dumps(values))
    run = load_run(config)
    task = load_task(run.path(run.task))
    clients = task.clients(None)

    # A short name: a socket of Ray's goes below it, and its path may have 107 characters.
    with (
        tempfile.TemporaryDirectory(prefix="ray-") as scratch,
        superlink(tmp_path / "home", Path(scratch)) as environment,
    ):
        printed = flwr_run(environment, tmp_path / "runs", config, nodes=len(clients))
    folder = tmp_path / "runs" / run.name
    assert (folder / "global.safetensors").is_file(), printed  # its exit code tells nothing of this
    rounds = [line for line in lines_of(folder / "metrics.jsonl") if "round" in line]

    # It ended by itself, after the last round that anyone could pay for.
    assert [line["round"] for line in rounds] == list(range(1, lasts + 1)), printed
    assert all(line["updates"] == len(clients) for line in rounds)
    assert f"round {lasts}/{lasts + 1}: accuracy" in printed

    # Epsilon is the accumulated one.
    expected = [max(epsilons(task, run, number)) for number in range(1, lasts + 1)]
    assert [line["epsilon_max"] for line in rounds] == pytest.approx(expected)
    assert rounds[-1]["epsilon_max"] <= run.privacy.max_epsilon
    assert min(epsilons(task, run, lasts + 1)) > run.privacy.max_epsilon  # so each had to decline

    # It learnt: guessing gives 0.1.
    model = build_model(task, run)
    load_checkpoint((folder / "global.safetensors").read_bytes(), model, where="test")
    assert evaluate(model, task.test_data(None), [ACCURACY])["accuracy"] > 0.5

    # Node ids are random there, and replies come in any order. The result is the same bits all the
    # same: each client draws from streams of its own name, and the mean over updates is exact.
    outcome, simulation = in_process(task, run)
    assert checkpoint_bytes(outcome.model) == (folder / "global.safetensors").read_bytes()
    assert [line["metrics"] for line in rounds] == [r.metrics for r in outcome.federated.rounds]
    ledgers = {name: read_ledger(context) for name, context in simulation.contexts.items()}
    assert ledgers.keys() == set(clients)
    assert all(
        [c.round for c in ledger.charges] == list(range(1, lasts + 1))
        for ledger in ledgers.values()
    )
