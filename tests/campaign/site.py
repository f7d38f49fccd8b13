"""A project, a server and devices in processes of their own, to be killed and started again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedcore.files import read_bytes
from fedcore.flower.records import read_record
from tests.e2e.live.conftest import TASK, Project, free_port

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
NAMES = ("edge-0", "edge-1", "edge-2")
PATIENCE_S = 120.0

_RUN = """
name = "trial"
task = "task.py"
seed = 1

[federation]
rounds = {rounds}
cohort = 3
quorum = 1.0
deadline_s = 600.0
strategy = "FedAdam"
{evaluation}
[client]
batch_size = 8
{privacy}
"""
_EVALUATION = "evaluate_cohort = 3\nholdout = 0.3\n"
_PRIVACY = '[privacy]\nunit = "example"\nmax_epsilon = 1e6\nnoise_multiplier = 1.0'


@dataclass
class Started:
    """A process and what it has said."""

    process: subprocess.Popen[bytes]
    log: Path
    born: float

    def said(self, *words: str) -> list[tuple[float, list[str]]]:
        """Moments and words of its lines that begin with one of ``words``."""
        found = []
        for line in self.log.read_text(errors="replace").splitlines():
            parts = line.split()
            if len(parts) > 2 and parts[0] == "#" and parts[2] in words:
                found.append((float(parts[1]), parts[2:]))
        return found

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
            time.sleep(0.005)
        return found

    def tail(self) -> str:
        return self.log.read_text(errors="replace")[-3000:]

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.kill()
        self.process.wait(30)

    def end(self) -> int:
        return self.process.wait(PATIENCE_S)


@dataclass
class Site:
    """One run's machines, all of them here."""

    root: Path
    rounds: int
    slow_s: float = 0.15
    server_host: str = "127.0.0.1"
    clock_off_s: float = 0.0
    private: bool = True
    """Whether clients train with privacy and keep a ledger; else they evaluate, too."""
    started: list[Started] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.root.mkdir(parents=True)
        self.project = Project(self.root)
        self.wake_port = free_port()
        text = TASK.replace("nn.Linear(5, 8)", "nn.Linear(5, 4000)")
        text = text.replace("nn.Linear(8, 3)", "nn.Linear(4000, 3)")
        slow = f"    import time\n    time.sleep({self.slow_s})\n    return TensorDataset"
        self.project.task.write_text(text.replace("    return TensorDataset", slow))
        text = _RUN.format(
            rounds=self.rounds,
            evaluation="" if self.private else _EVALUATION,
            privacy=_PRIVACY if self.private else "",
        )
        (self.root / "run.toml").write_text(text)
        for name in NAMES:
            self.project.device(name)

    @property
    def folder(self) -> Path:
        return self.root / "runs" / "trial"

    def server(self, *arguments: str, die: str = "") -> Started:
        return self._start(
            "server_main.py",
            *(self.root / "run.toml", self.root / "server", self.root / "runs"),
            *(self.server_host, self.project.port, self.wake_port),
            *(["--die", die] if die else []),
            *arguments,
        )

    def device(self, name: str) -> Started:
        return self._start(
            "device_main.py",
            *(self.root / name, self.project.task, self.root / f"{name}-data"),
            *("--clock-off-s", self.clock_off_s),
        )

    def devices(self) -> dict[str, Started]:
        return {name: self.device(name) for name in NAMES}

    def _start(self, script: str, *arguments: object) -> Started:
        log = self.root / f"{len(self.started)}.log"
        with log.open("wb") as stream:
            process = subprocess.Popen(
                [sys.executable, str(HERE / script), *map(str, arguments)],
                cwd=self.root,
                stdout=stream,
                stderr=stream,
                env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            )
        one = Started(process, log, time.time())
        self.started.append(one)
        return one

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
