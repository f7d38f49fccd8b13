"""A project for the deployment benchmark: authority, server and kits, and the processes of both."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.measure import ProgramFailed, anonymous_bytes, pss_bytes, tree
from fedcore.crypto.certificates import pem
from fedcore.crypto.issue import issue_authority, issue_member, issue_server
from fedcore.crypto.keys import new_key, save_key
from fedcore.crypto.kit import KitFile, write_kit
from fedcore.crypto.roster import RosterEntry, RosterFile
from fedcore.files import write_atomic

_TASK = '''"""A small classification task{about}."""

import torch
from torch import nn
from torch.utils.data import TensorDataset

from fedcore import Task


class Net(nn.Module):
    """{parameters}"""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 46))
        self.pad = nn.Parameter(torch.randn({pad})) if {pad} else None

    def forward(self, x):
        return self.net(x)


def data(client):
    rng = torch.Generator().manual_seed(sum(map(ord, client)))
    return TensorDataset(
        torch.randn(100, 32, generator=rng), torch.randint(46, (100,), generator=rng)
    )


task = Task(
    name="deployment",
    kind="classification",
    model=Net,
    clients=lambda folder: ["edge-0", "edge-1"],
    client_data=lambda client, folder: data(client),
    test_data=lambda folder: data("test"),
    example_input=torch.zeros(32),
)
'''
SMALL_PARAMETERS = 32 * 64 + 64 + 64 * 46 + 46
"""5,102: two layers."""


@dataclass(frozen=True)
class Project:
    """Everything that one part of the benchmark needs, in one folder."""

    root: Path
    port: int
    names: tuple[str, ...]

    @property
    def task(self) -> Path:
        """The task file, the same for server and devices."""
        return self.root / "task.py"

    def kit(self, name: str) -> Path:
        """The folder of a device's identity."""
        return self.root / "kits" / name


def make_project(root: Path, devices: int, *, parameters: int = SMALL_PARAMETERS) -> Project:
    """Makes an authority, a server's identity and one for each device, and a task."""
    root.mkdir(parents=True)
    now, authority_key = datetime.now(UTC), new_key()
    authority = issue_authority(authority_key, project="benchmark", now=now)
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = int(probe.getsockname()[1])
    project = Project(root, port, tuple(f"edge-{place}" for place in range(devices)))

    def install(folder: Path, key: Any, certificate: Any) -> None:
        folder.mkdir(parents=True)
        save_key(folder / "key.pem", key)
        file = KitFile(
            servers=(f"https://127.0.0.1:{port}",),
            certificate=pem(certificate).decode(),
            authority=pem(authority).decode(),
        )
        write_kit(folder, file)

    members = []
    for name in project.names:
        key = new_key()
        certificate = issue_member(
            key.public_key(),
            name=name,
            role="device",
            authority=authority,
            authority_key=authority_key,
            now=now,
            validity=timedelta(days=1),
        )
        install(project.kit(name), key, certificate)
        members.append(RosterEntry(certificate=pem(certificate).decode()))
    key = new_key()
    certificate = issue_server(
        key.public_key(),
        hosts=["127.0.0.1", "localhost"],
        authority=authority,
        authority_key=authority_key,
        now=now,
    )
    install(root / "server", key, certificate)
    roster = RosterFile(version=1, members=tuple(members)).signed(authority_key)
    write_atomic(root / "server" / "roster.json", roster.to_bytes())
    pad = parameters - SMALL_PARAMETERS
    project.task.write_text(_TASK.format(about="", parameters=f"{parameters} parameters.", pad=pad))
    return project


@dataclass(frozen=True)
class Memory:
    """Of all of a server's processes."""

    before_bytes: int
    """With the global model loaded and no round on."""
    peak_bytes: int
    seconds: float
    """From then on, until all updates were aggregated."""

    @property
    def risen_bytes(self) -> int:
        """How far it rose."""
        return self.peak_bytes - self.before_bytes


@dataclass
class Program:
    """A process that is watched from outside."""

    process: subprocess.Popen[bytes]
    said: Path
    """Its standard output."""
    log: Path
    """Its standard error."""
    _read: tuple[int, list[dict[str, Any]]] = (0, [])
    """Size of the output when it was last read, and its lines: a look without news costs little."""

    def events(self, kind: str) -> list[dict[str, Any]]:
        """The JSON lines of a kind that it has printed."""
        size = self.said.stat().st_size
        if size != self._read[0]:
            lines = self.said.read_text().splitlines()
            whole = [line for line in lines if line.startswith("{") and line.endswith("}")]
            self._read = size, [json.loads(line) for line in whole]
        return [one for one in self._read[1] if one.get("event") == kind]

    def wait_for(self, text: str, *, limit_s: float = 120.0) -> None:
        """Waits until it has logged or printed ``text``."""
        end = time.monotonic() + limit_s
        while text not in self.log.read_text() + self.said.read_text():
            if self.process.poll() is not None or time.monotonic() > end:
                raise ProgramFailed(f"no {text!r} from {self.process.args!r}: {self.last_words()}")
            time.sleep(0.02)

    def last_words(self) -> str:
        """The end of what it logged."""
        return " / ".join(self.log.read_text(errors="replace").splitlines()[-6:])

    def family(self) -> set[int]:
        """It and its children."""
        return tree(self.process.pid)

    def pss_bytes(self) -> int:
        """Memory of it and its children."""
        return sum(map(pss_bytes, self.family()))

    def anonymous_bytes(self) -> int:
        """What it and its children have allocated."""
        return sum(map(anonymous_bytes, self.family()))

    def cpu_s(self) -> float:
        """CPU time that it has used."""
        return _cpu_s(self.process.pid)

    def family_cpu_s(self) -> float:
        """CPU time that it and its children have used."""
        return sum(map(_cpu_s, self.family()))

    def end(self) -> None:
        """Ends it and its children, gently at first."""
        family = self.family() if self.process.poll() is None else set()
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        for member in family - {self.process.pid}:
            try:
                os.kill(member, signal.SIGKILL)
            except ProcessLookupError:
                continue


def _cpu_s(process: int) -> float:
    try:
        stat = Path(f"/proc/{process}/stat").read_text()
    except OSError:  # it has just ended
        return 0.0
    fields = stat.rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextmanager
def running(
    command: Sequence[str | Path],
    folder: Path,
    name: str,
    *,
    environment: dict[str, str],
    core: int | None = None,
) -> Iterator[Program]:
    """Runs a program below ``folder`` until the block ends, on one ``core`` alone where named."""
    said, log = folder / f"{name}.out", folder / f"{name}.log"
    with said.open("wb") as out, log.open("wb") as errors:
        process = subprocess.Popen(
            list(command),
            cwd=folder,
            stdout=out,
            stderr=errors,
            env={**os.environ, **environment},
            preexec_fn=None if core is None else partial(os.sched_setaffinity, 0, {core}),
        )
    program = Program(process, said, log)
    try:
        yield program
    finally:
        program.end()


ROOT = Path(__file__).parent.parent


def server(
    project: Project,
    name: str,
    *,
    core: int | None = None,
    source: Path = ROOT,
    **federation: object,
) -> Any:
    """`fedcore server start` over ``project``, as a context of its `Program`.

    ``source`` is the checkout that it is run from.
    """
    settings = "\n".join(f"{key} = {json.dumps(value)}" for key, value in federation.items())
    config = project.root / f"{name}.toml"
    config.write_text(
        f'name = "{name}"\ntask = "task.py"\nseed = 1\n[federation]\n{settings}\n'
        "[client]\nbatch_size = 20\n"
    )
    command = [
        *(sys.executable, "-m", "fedcore.cli", "server", "start", config),
        *("--identity", project.root / "server", "--listen", f"127.0.0.1:{project.port}"),
        *("--wake-port", "0", "--runs", project.root / "runs", "--json"),
    ]
    environment = {**ONE_THREAD, "PYTHONPATH": str(source)}
    return running(command, project.root, f"{name}-server", environment=environment, core=core)


def device(project: Project, name: str) -> Any:
    """`fedcore client start` as a device of ``project``, as a context of its `Program`."""
    command = [
        *(sys.executable, "-m", "fedcore.cli", "client", "start"),
        *("--kit", project.kit(name), "--task", project.task),
    ]
    return running(command, project.root, name, environment=ONE_THREAD)


def load(
    project: Project,
    name: str,
    *,
    count: int,
    first: int = 0,
    parameters: int = SMALL_PARAMETERS,
    together: bool = False,
    core: int | None = None,
    source: Path = ROOT,
) -> Any:
    """Protocol-level devices in one process: see `benchmarks.deployment_devices`."""
    command = [
        *(sys.executable, "-m", "benchmarks.deployment_devices", "--project", project.root),
        *("--first", str(first), "--count", str(count), "--parameters", str(parameters)),
        *(["--together"] if together else []),
    ]
    environment = {**ONE_THREAD, "PYTHONPATH": str(source)}
    return running(command, project.root, name, environment=environment, core=core)


ONE_THREAD = {"OMP_NUM_THREADS": "1"}
SAMPLE_S = 0.1
"""Time between two looks at a server's memory, the same for each system."""
