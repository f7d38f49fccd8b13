"""Runs that are interrupted, killed and resumed, as real processes."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedcore.seeds import numpy_rng
from server.report.folder import CHECKPOINT
from server.simulation.checkpoint import read_checkpoint
from tests.e2e.conftest import without_waiting
from tests.prefork import Prefork, Process

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("resume")]

_TASK = """
import os, time
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import TensorDataset
from fedcore import Task

def data(name, folder):
    if name == "client-3" and os.environ.get("BROKEN"):
        raise OSError("its disk is gone")
    if name.startswith("client") and os.environ.get("SLOW"):
        time.sleep(float(os.environ["SLOW"]))
    rng = torch.Generator().manual_seed(sum(map(ord, name)))
    targets = torch.randint(3, (20,), generator=rng)
    inputs = nn.functional.one_hot(targets, 5) + 0.3 * torch.randn(20, 5, generator=rng)
    return TensorDataset(inputs, targets)

task = Task(
    name="tiny",
    kind="classification",
    model=lambda: nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3)),
    clients=lambda folder: [f"client-{number}" for number in range(12)],
    client_data=data,
    test_data=lambda folder: data("test", folder),
    cloud_data=lambda folder: data("cloud", folder),
    example_input=torch.zeros(5),
)
"""
_RUN = """
name = "tiny"
task = "task.py"
seed = 3

[federation]
rounds = 12
cohort = 4
quorum = 0.2
strategy = "FedAdam"
normalisation = "cloud"

[client]
batch_size = 8

[privacy]
unit = "example"
max_epsilon = 1e4
noise_multiplier = 1.0

[finetune]
epochs = 0

[compression]
candidates = ["fp32"]
timing_runs = 100

[simulation]
training = "loop"
workers = 2

[[simulation.devices]]
name = "phone"
examples_per_s = 100.0
availability = 0.9
dropout = 0.1
"""
# Checkpoints are written at every round, so that there is one to lose at any moment.
_OFTEN = """
from server.simulation import checkpointer
checkpointer._EVERY_S, checkpointer._MAX_TIME_SHARE = 0.0, 1.0
"""
_TIMES = {"seconds", "elapsed_s", "clients_per_s", "remaining_s", "memory_bytes"}


class Started:
    """One command line that runs."""

    def __init__(self, process: Process, cwd: Path) -> None:
        self._process = process
        self._cwd = cwd
        self.pid = process.pid

    def wait(self) -> int:
        """Its exit code; negative where a signal ended it."""
        code = self._process.wait(120)
        deadline = time.monotonic() + 10
        while (left := _alive(self.pid)) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert left == []  # no worker outlives it
        return code

    @property
    def out(self) -> str:
        return (self._cwd / "out.txt").read_text()

    @property
    def err(self) -> str:
        return without_waiting((self._cwd / "err.txt").read_text())

    def until(self, text: str) -> None:
        """Waits until it has printed ``text``."""
        deadline = time.monotonic() + 60
        while text not in self.out + self.err:
            assert time.monotonic() < deadline, self.out + self.err
            time.sleep(0.005)


def _alive(session: int) -> list[str]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            found.append(folder.name)
    return found


class Shell:
    """Runs `fedcore simulate run.toml` in one folder."""

    def __init__(self, prefork: Prefork, folder: Path) -> None:
        self._prefork = prefork
        self.folder = folder

    def start(self, *options: str, runs: str = "runs", **env: str) -> Started:
        arguments = ["simulate", "run.toml", "--runs", runs, *options]
        kept = {name: value for name, value in os.environ.items() if name != "FEDCORE_DATA"}
        out, err = (self.folder / name for name in ("out.txt", "err.txt"))
        with out.open("w") as out_stream, err.open("w") as err_stream:
            process = self._prefork.start(
                arguments,
                cwd=self.folder,
                env={**kept, "OMP_NUM_THREADS": "1", **env},
                stdout=out_stream,
                stderr=err_stream,
            )
        return Started(process, self.folder)

    def run(self, *options: str, runs: str = "runs", **env: str) -> tuple[int, str, str]:
        started = self.start(*options, runs=runs, **env)
        return started.wait(), started.out, started.err

    def results(self, runs: str = "runs") -> Path:
        return self.folder / runs / "tiny"


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shell]:
    folder = tmp_path_factory.mktemp("work")
    (folder / "task.py").write_text(_TASK)
    (folder / "run.toml").write_text(_RUN)
    prefork = Prefork(prepare=_OFTEN)
    yield Shell(prefork, folder)
    prefork.close()


@pytest.fixture(scope="module")
def whole(shell: Shell) -> Path:
    """The results of a run that nobody interrupted."""
    code, out, err = shell.run(runs="whole")
    assert code == 0, out + err
    return shell.results("whole")


def rounds(results: Path) -> list[dict[str, Any]]:
    """What metrics.jsonl says of rounds, but for times."""
    lines = [json.loads(line) for line in (results / "metrics.jsonl").read_text().splitlines()]
    return [
        {name: value for name, value in line.items() if name not in _TIMES}
        for line in lines
        if line["event"] == "round_finished"
    ]


def check_same(one: Path, other: Path) -> None:
    """Two runs gave the same bits."""
    for name in ("global.safetensors", "candidates/fp32.onnx"):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    assert rounds(one) == rounds(other)
    mine, theirs = (read_checkpoint(results / CHECKPOINT) for results in (one, other))
    assert mine.progress.weights.tobytes() == theirs.progress.weights.tobytes()
    assert mine.progress.strategy.tree == theirs.progress.strategy.tree
    for left, right in zip(
        mine.progress.strategy.arrays, theirs.progress.strategy.arrays, strict=True
    ):
        assert np.array_equal(left, right)
    assert mine.state == theirs.state
    summaries = [json.loads((results / "summary.json").read_text()) for results in (one, other)]
    for name in ("accuracy", "epsilon", "bytes", "virtual", "rounds"):
        assert summaries[0][name] == summaries[1][name]


def test_a_run_that_is_killed_again_and_again_gives_the_same_bits(
    shell: Shell, whole: Path
) -> None:
    results, rng = shell.results("killed"), numpy_rng(int(time.time()))
    resume: list[str] = []
    for round_to_see in (2, 5, 8, 12):
        started = shell.start(*resume, runs="killed", SLOW="0.01")  # rounds are seen late
        started.until(f"round {round_to_see}/12" if round_to_see < 12 else "[compress] started")
        time.sleep(rng.uniform(0, 0.05))
        os.kill(started.pid, signal.SIGKILL)
        assert started.wait() == -signal.SIGKILL
        assert (results / CHECKPOINT).is_file()
        resume = ["--resume"]
    code, out, err = shell.run("--resume", runs="killed")
    assert code == 0, out + err
    check_same(whole, results)
    assert not list(results.rglob(".*"))  # nothing half-written is left
    events = [json.loads(line) for line in (results / "metrics.jsonl").read_text().splitlines()]
    texts = [event["text"] for event in events if event["event"] == "noted"]
    assert sum(text.startswith("Resumed after round") for text in texts) >= 2
    assert sum(text.startswith("Clients are trained") for text in texts) == 1


@pytest.mark.parametrize(
    ("number", "to_all"),
    [(signal.SIGINT, True), (signal.SIGTERM, False), (signal.SIGTERM, True)],
    ids=["a terminal's", "a container's", "a service's"],
)
def test_the_first_ctrl_c_finishes_the_round(
    number: signal.Signals, to_all: bool, shell: Shell, whole: Path
) -> None:
    runs = f"asked-{number}-{to_all}"
    started = shell.start(runs=runs, SLOW="0.004")
    started.until("round 5/12")
    (os.killpg if to_all else os.kill)(started.pid, number)
    assert started.wait() == 130
    said = started.err.splitlines()
    assert said[0].startswith("Interrupted: finishing the round")
    assert said[1:] == [
        f"Interrupted: `fedcore simulate run.toml --runs {runs} --resume` continues it."
    ]
    assert not (shell.results(runs) / "summary.json").exists()
    code, out, err = shell.run("--resume", runs=runs)
    assert code == 0, out + err
    assert "Resumed after round" in out
    check_same(whole, shell.results(runs))


def test_the_second_ctrl_c_stops_at_once(shell: Shell, whole: Path) -> None:
    started = shell.start(runs="insisted", SLOW="0.004")
    started.until("round 3/12")
    os.kill(started.pid, signal.SIGINT)
    assert started.wait() == 130
    started = shell.start("--resume", runs="insisted", SLOW="30")
    started.until("Resumed after round")
    os.kill(started.pid, signal.SIGINT)
    started.until("finishing the round")
    asked = time.monotonic()
    os.kill(started.pid, signal.SIGINT)
    assert started.wait() == 130
    assert time.monotonic() - asked < 15  # and the round would have taken minutes
    assert "Traceback" not in started.err
    code, _, _ = shell.run("--resume", runs="insisted")
    assert code == 0
    check_same(whole, shell.results("insisted"))


def test_a_failed_round_is_repeated_once_its_cause_is_gone(shell: Shell, whole: Path) -> None:
    strict = ["--set", "federation.quorum=0.9", "--set", "simulation.devices=[]"]
    code, out, err = shell.run(*strict, runs="failed", BROKEN="1")
    assert code == 4, err
    assert err.startswith("DataError: round ")
    assert "--replay" in out
    code, out, err = shell.run(*strict, "--resume", runs="failed")
    assert code == 0, err
    code, _, _ = shell.run(*strict, runs="whole-strict")
    assert code == 0
    check_same(shell.results("whole-strict"), shell.results("failed"))


def test_a_client_that_fails_is_replayed_with_its_traceback(shell: Shell) -> None:
    small = ["--set", "federation.rounds=2", "--set", "federation.cohort=12"]
    small += ["--set", "simulation.devices=[]"]
    code, out, err = shell.run(*small, runs="replayed", BROKEN="1")
    assert code == 0, err
    note = next(line for line in out.splitlines() if line.startswith("note: round"))
    asked = note.rpartition("--replay ")[2].removesuffix("` shows the full error.")
    number, client = asked.split(":")
    assert (number, client) == ("1", "client-3")
    results = shell.results("replayed")
    assert [path.name for path in (results / "failed").iterdir()] == [f"round-{number}.safetensors"]
    before = {path: path.stat().st_mtime_ns for path in results.rglob("*")}
    again = [*small, "--replay", asked]
    code, out, err = shell.run(*again, runs="replayed", BROKEN="1")
    assert code == 4
    assert "Traceback (most recent call last)" in err
    assert 'raise OSError("its disk is gone")' in err
    assert "DataError" in out
    code, out, err = shell.run(*again, "--json", runs="replayed")
    assert all(line.startswith("note: ") for line in err.splitlines())  # of a wait, if it is slow
    found = json.loads(out)
    assert (code, found["ok"]) == (0, True)
    assert (found["round"], found["client"]) == (int(number), client)
    assert found["metrics"]["epsilon"] > 0
    code, out, err = shell.run(*small, "--replay", "2:client-4", "--json", runs="replayed")
    assert code == 0, err
    assert err.splitlines()[-1] == "Simulating rounds 1 to 1 again."
    assert json.loads(out)["round"] == 2
    assert {path: path.stat().st_mtime_ns for path in results.rglob("*")} == before


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--set", "federation.cohort=5"], "federation.cohort (4 then, 5 now)"),
        (["--rounds", "2"], "but round "),
        (["--set", "client.learning_rate=0.2"], "client.learning_rate (0.1 then, 0.2 now)"),
    ],
)
def test_another_run_is_not_resumed(
    options: list[str], said: str, shell: Shell, whole: Path
) -> None:
    started = shell.start("--fresh", runs="other", SLOW="0.004")
    started.until("round 3/12")
    os.kill(started.pid, signal.SIGINT)
    started.wait()
    kept = (shell.results("other") / CHECKPOINT).read_bytes()
    code, _, err = shell.run("--resume", *options, runs="other")
    assert code == 2
    assert said in err
    assert (shell.results("other") / CHECKPOINT).read_bytes() == kept
    code, _, err = shell.run("--resume", runs="none")
    assert code == 2
    assert "none to resume" in err
    code, _, err = shell.run("--resume", runs="whole")
    assert code == 2
    assert "this run is complete" in err


def test_fewer_workers_may_go_on(shell: Shell, whole: Path) -> None:
    started = shell.start(runs="fewer", SLOW="0.004")
    started.until("round 7/12")
    os.kill(started.pid, signal.SIGKILL)
    started.wait()
    code, _, err = shell.run("--resume", "--set", "simulation.workers=1", runs="fewer")
    assert code == 0, err
    check_same(whole, shell.results("fewer"))
