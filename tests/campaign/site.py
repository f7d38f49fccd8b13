"""A project, a server and devices in processes of their own, to be killed and started again."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from fedcore.files import read_bytes
from fedcore.flower.records import read_record
from tests.e2e.live.conftest import TASK, Project
from tests.prefork import Prefork, Process

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
BEHIND = "127.0.0.3"
"""Where a server listens that devices reach through a proxy."""
NAMES = ("edge-0", "edge-1", "edge-2")
PATIENCE_S = 120.0

_RUN = """
name = "trial"
task = "task.py"
seed = 1

[federation]
rounds = {rounds}
cohort = 3
quorum = {quorum}
deadline_s = 600.0
strategy = "FedAdam"
{evaluation}
[client]
batch_size = 8
{privacy}
"""
_EVALUATION = "evaluate_cohort = 3\nholdout = 0.3\n"
_RELEASE = """
[finetune]
epochs = 5
max_metric_drop = 1.0

[compression]
candidates = ["fp32", "int8_dynamic"]
timing_runs = 100

[release]
repository = "releases"
keys = "keys"
"""
_CLOUD = '    cloud_data=lambda folder: data("cloud"),\n    example_input'
_PRIVACY = '[privacy]\nunit = "example"\nmax_epsilon = 1e6\nnoise_multiplier = 1.0'


def _port() -> int:
    """A free one that no connection is given by chance while the server is down."""
    while True:
        port = random.randrange(20000, 30000)
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


@dataclass
class Started:
    """A process and what it has said."""

    process: subprocess.Popen[bytes] | Process
    log: Path
    born: float
    patience_s: float
    """How long its end is waited for."""

    def said(self, *words: str) -> list[tuple[float, list[str]]]:
        """Moments and words of its lines that begin with one of ``words``."""
        found = []
        for line in self.log.read_text(errors="replace").splitlines():
            parts = line.split()
            if len(parts) > 2 and parts[0] == "#" and parts[2] in words:
                found.append((float(parts[1]), parts[2:]))
        return found

    def logged(self, text: str) -> list[float]:
        """Moments of the lines of its log that hold ``text``."""
        lines = self.log.read_text(errors="replace").splitlines()
        stamps = [line.split(" ", 1)[0] for line in lines if text in line]
        return [datetime.fromisoformat(stamp).timestamp() for stamp in stamps]

    def until(self, what: Callable[[], Any], *, dead: bool = False) -> Any:
        """Waits until ``what`` holds, or, where ``dead`` is allowed, until the process is dead."""
        end = time.monotonic() + PATIENCE_S
        while not (found := what()):
            if self.process.poll() is not None:
                if dead:
                    return None
                raise AssertionError(f"it ended ({self.process.returncode}): {self.tail()}")
            if time.monotonic() > end:
                raise AssertionError(f"it did not come to pass: {self.tail()}")
            time.sleep(0.02)  # moments are those that the process itself has noted
        return found

    def tail(self) -> str:
        return self.log.read_text(errors="replace")[-3000:]

    def below(self) -> list[int]:
        """The processes that it has started, and they."""
        found, new = [], [self.process.pid]
        while new:
            pid = new.pop()
            with suppress(OSError):
                text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
                new += [int(word) for word in text.split()]
                found += [int(word) for word in text.split()]
        return found

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.kill()
        self.process.wait(30)

    def end(self) -> int:
        """Its exit code."""
        try:
            return self.process.wait(self.patience_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"it did not end: {self.tail()}") from None


@dataclass
class Site:
    """One run's machines, all of them here."""

    root: Path
    rounds: int
    slow_s: float = 0.15
    proxied: tuple[str, ...] = ()
    """Devices that reach the server through 127.0.0.1, where a proxy is; the server is behind."""
    quorum: float = 1.0
    clock_off_s: float = 0.0
    """How wrong the clocks of devices are."""
    server_clock_off_s: float = 0.0
    private: bool = True
    """Whether clients train with privacy and keep a ledger; else they evaluate, too."""
    releases: bool = False
    """Whether fine-tuning, compression and a release follow the rounds."""
    prefork: Prefork | None = None
    """Starts the processes; None where each imports what it needs itself, as a real one does."""
    started: list[Started] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.root.mkdir(parents=True)
        self.project = Project(self.root, _port())
        self.wake_port = _port()
        text = TASK.replace("nn.Linear(5, 8)", "nn.Linear(5, 4000)")
        text = text.replace("nn.Linear(8, 3)", "nn.Linear(4000, 3)")
        slow = f"    import time\n    time.sleep({self.slow_s})\n    return TensorDataset"
        text = text.replace("    return TensorDataset", slow)
        if self.releases:
            text = text.replace("    example_input", _CLOUD)
            self.fedcore("release", "init", "--repository", "releases", "--keys", "keys")
        self.project.task.write_text(text)
        text = _RUN.format(
            rounds=self.rounds,
            quorum=self.quorum,
            evaluation="" if self.private else _EVALUATION,
            privacy=_PRIVACY if self.private else "",
        )
        (self.root / "run.toml").write_text(text + (_RELEASE if self.releases else ""))
        for name in NAMES:
            behind = self.server_host if name not in self.proxied else "127.0.0.1"
            self.project.device(name, host=behind)

    @property
    def server_host(self) -> str:
        """Where the server listens."""
        return BEHIND if self.proxied else "127.0.0.1"

    @property
    def folder(self) -> Path:
        return self.root / "runs" / "trial"

    def server(self, *arguments: str, die: str = "") -> Started:
        return self._start(
            "server_main.py",
            *(self.root / "run.toml", self.root / "server", self.root / "runs"),
            *(self.server_host, self.project.port, self.wake_port),
            *(["--die", die] if die else []),
            *("--clock-off-s", self.server_clock_off_s),
            *arguments,
        )

    def device(self, name: str, *, die: str = "") -> Started:
        return self._start(
            "device_main.py",
            *(self.root / name, self.project.task, self.root / f"{name}-data"),
            *(["--die", die] if die else []),
            *("--clock-off-s", self.clock_off_s),
        )

    def devices(self) -> dict[str, Started]:
        return {name: self.device(name) for name in NAMES}

    def _start(self, script: str, *arguments: object) -> Started:
        log = self.root / f"{len(self.started)}.log"
        env = os.environ | {
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
            "XDG_STATE_HOME": str(self.root / "counts"),
        }
        words = [*map(str, arguments)]
        with log.open("w") as stream:
            if self.prefork is None:
                command = [sys.executable, str(HERE / script), *words]
                process: subprocess.Popen[bytes] | Process = subprocess.Popen(
                    command, cwd=self.root, stdout=stream, stderr=stream, env=env
                )
            else:
                run = f"import runpy; runpy.run_path({str(HERE / script)!r}, run_name='__main__')"
                process = self.prefork.start(
                    words, cwd=self.root, stdout=stream, stderr=stream, env=env, code=run
                )
        one = Started(process, log, time.time(), PATIENCE_S + 6.0 * self.rounds)
        self.started.append(one)
        return one

    def fedcore(self, *words: str) -> str:
        """What a verb prints."""
        command = [sys.executable, "-m", "fedcore.cli", *words]
        done = subprocess.run(command, cwd=self.root, capture_output=True, text=True)
        if done.returncode:
            raise AssertionError(f"{' '.join(words)}: {done.stderr}")
        return done.stdout

    def published(self) -> list[dict[str, Any]]:
        """The models that were released."""
        told = ("--repository", "releases", "--keys", "keys", "--json")
        found: list[dict[str, Any]] = json.loads(self.fedcore("release", "list", *told))
        return found

    def result(self) -> dict[str, Any]:
        """What the run left: its model, its rounds, and what each device's ledger says."""
        lines = [json.loads(line) for line in (self.folder / "metrics.jsonl").open()]
        rounds = [line for line in lines if line["event"] == "round_finished"]
        for one in rounds:
            one.pop("seconds")
        return {
            "model": (self.folder / "global.safetensors").read_bytes(),
            "rounds": rounds,
            "charged": {name: self.charged(name) for name in NAMES} if self.private else {},
        }

    def charged(self, name: str) -> list[int]:
        """The rounds that a device's ledger has charges for."""
        path = self.root / f"{name}-data" / "state" / "trial.state"
        raw = read_bytes(path, max_bytes=2**26, what="state")
        record = read_record(raw, where=str(path)).config_records["fedcore.ledger"]
        return sorted(charge["round"] for charge in json.loads(str(record["charges"])))


@contextmanager
def site(root: Path, rounds: int, **more: Any) -> Iterator[Site]:
    """A site whose processes are all dead afterwards."""
    made = Site(root, rounds, **more)
    try:
        yield made
    finally:
        for one in made.started:
            one.kill()
