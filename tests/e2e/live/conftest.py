"""A project with its own authority, a live server on this machine, and devices beside it."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey

from edge_client.agent.loop import run_device
from edge_client.agent.run import DeviceSetup
from edge_client.agent.wake import Signals
from edge_client.device_folder import lock_device_folder
from fedcore.config.owner import OPEN_POLICY
from fedcore.config.run import RunConfig
from fedcore.crypto.certificates import pem
from fedcore.crypto.issue import issue_authority, issue_member, issue_server
from fedcore.crypto.keys import new_key, save_key
from fedcore.crypto.kit import Kit, KitFile, load_kit, write_kit
from fedcore.crypto.roster import RosterEntry, RosterFile, ServerIdentity, load_server_identity
from fedcore.files import write_atomic
from fedcore.rpc.hello import hello_of
from fedcore.seeds import Simulated
from fedcore.task.definition import load_task
from server.live.network.limits import Limits
from server.live.network.serve import Address, Listening, listen
from server.live.rounds.settings import device_settings
from tests.e2e.live.program import RUN_VERB, Program
from tests.prefork import Prefork

TASK = '''
import torch
from torch import nn
from torch.utils.data import TensorDataset

from fedcore import Task

WEIGHTS = 0


class Padded(nn.Module):
    """A small net, and as many further weights as a test wants to send."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))
        self.pad = nn.Parameter(torch.zeros(WEIGHTS))

    def forward(self, x):
        return self.net(x)


def data(client):
    rng = torch.Generator().manual_seed(sum(map(ord, client)))
    targets = torch.randint(3, (20,), generator=rng)
    inputs = nn.functional.one_hot(targets, 5) + 0.3 * torch.randn(20, 5, generator=rng)
    return TensorDataset(inputs, targets)


task = Task(
    name="tiny",
    kind="classification",
    model=lambda: Padded() if WEIGHTS else Padded().net,
    clients=lambda folder: ["edge-0", "edge-1", "edge-2", "edge-3"],
    client_data=lambda client, folder: data(client),
    test_data=lambda folder: data("test"),
    example_input=torch.zeros(5),
)
'''


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


@dataclass
class Project:
    """An authority, the server's identity and those of devices, each in a folder of its own."""

    root: Path
    port: int = field(default_factory=free_port)
    key: EllipticCurvePrivateKey = field(default_factory=new_key)
    members: dict[str, RosterEntry] = field(default_factory=dict)
    version: int = 0

    def __post_init__(self) -> None:
        self.now = datetime.now(UTC)
        self.authority = issue_authority(self.key, project="trial", now=self.now)
        key = new_key()
        certificate = issue_server(
            key.public_key(),
            hosts=["127.0.0.1", "localhost", "127.0.0.3"],
            authority=self.authority,
            authority_key=self.key,
            now=self.now,
        )
        self._install(self.root / "server", key, certificate)
        self.write_roster()
        self.task = self.root / "task.py"
        self.task.write_text(TASK)

    def _install(
        self,
        folder: Path,
        key: EllipticCurvePrivateKey,
        certificate: x509.Certificate,
        host: str = "127.0.0.1",
    ) -> None:
        folder.mkdir(parents=True)
        save_key(folder / "key.pem", key)
        file = KitFile(
            servers=(f"https://{host}:{self.port}",),
            certificate=pem(certificate).decode(),
            authority=pem(self.authority).decode(),
        )
        write_kit(folder, file)

    def write_roster(self) -> None:
        self.version += 1
        file = RosterFile(version=self.version, members=tuple(self.members.values()))
        raw = file.signed(self.key).to_bytes()
        write_atomic(self.root / "server" / "roster.json", raw)

    def server(self) -> ServerIdentity:
        return load_server_identity(self.root / "server")

    def device(self, name: str, *, role: str = "device", host: str = "127.0.0.1") -> Kit:
        folder = self.root / name
        if not folder.exists():
            key = new_key()
            certificate = issue_member(
                key.public_key(),
                name=name,
                role=role,  # type: ignore[arg-type]
                authority=self.authority,
                authority_key=self.key,
                now=self.now,
                validity=timedelta(days=1),
            )
            self._install(folder, key, certificate, host)
            self.members[name] = RosterEntry(certificate=pem(certificate).decode())
            self.write_roster()
        return load_kit(folder)

    def revoke(self, name: str) -> None:
        self.members[name] = self.members[name].model_copy(update={"revoked_at": datetime.now(UTC)})
        self.write_roster()

    def run(self, **federation: object) -> RunConfig:
        values = {
            "name": "trial",
            "task": "task.py",
            "seed": 1,
            "federation": {"rounds": 2, "deadline_s": 30.0} | federation,
            "client": {"batch_size": 8},
        }
        run = RunConfig.model_validate(values)
        return run.model_copy(update={"base": self.root})


@dataclass
class Served:
    listening: Listening
    loop: asyncio.AbstractEventLoop

    def call(self, work: Callable[[], object]) -> None:
        self.loop.call_soon_threadsafe(work)


Serve = Callable[..., AbstractContextManager[Served]]
Start = Callable[..., "Running"]


@dataclass
class Running:
    """A device in a thread of this process."""

    thread: threading.Thread
    signals: Signals
    errors: list[BaseException]

    def stop(self) -> None:
        self.signals.stop.set()
        self.signals.work.set()
        self.thread.join(20)
        assert not self.thread.is_alive()


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path)


@pytest.fixture
def serve(project: Project) -> Serve:
    """Serves in a thread, with an event loop of its own."""

    @contextmanager
    def serving(run: RunConfig | None = None, limits: Limits | None = None) -> Iterator[Served]:
        settings = device_settings(run or project.run(), instance="first")
        hello = hello_of("tiny", project.task)
        address = Address("127.0.0.1", project.port, 0)
        up, served, failed = threading.Event(), list[Served](), list[BaseException]()
        end: list[asyncio.Event] = []

        async def main() -> None:
            end.append(asyncio.Event())
            async with listen(
                project.server(),
                hello,
                address,
                settings=settings,
                spool=project.root / "incoming",
                limits=limits,
            ) as listening:
                served.append(Served(listening, asyncio.get_running_loop()))
                up.set()
                await end[0].wait()

        def body() -> None:
            try:
                asyncio.run(main())
            except BaseException as error:
                failed.append(error)
            finally:
                up.set()

        thread = threading.Thread(target=body, name="server")
        thread.start()
        assert up.wait(20)
        if failed:
            thread.join()
            raise failed[0]
        try:
            yield served[0]
        finally:
            served[0].call(end[0].set)
            thread.join(20)
            assert not thread.is_alive()
            assert not failed

    return serving


@pytest.fixture
def start(project: Project) -> Iterator[Start]:
    """Starts a device in a thread; every one is stopped at the end."""
    started: list[Running] = []

    def starting(name: str = "edge-0", *, folder: str = "", task: Path | None = None) -> Running:
        kit, signals, errors = project.device(name), Signals(), list[BaseException]()
        path = task or project.task

        def body() -> None:
            try:
                with lock_device_folder(project.root / (folder or f"{name}-data")) as owned:
                    made = (kit, load_task(path), path, OPEN_POLICY, owned, Simulated(1))
                    run_device(DeviceSetup(*made), signals)
            except BaseException as error:
                errors.append(error)

        thread = threading.Thread(target=body, name=name)
        running = Running(thread, signals, errors)
        started.append(running)
        thread.start()
        return running

    yield starting
    for running in started:
        running.stop()


@pytest.fixture(autouse=True)
def _flower_says_little() -> Iterator[None]:
    logger = logging.getLogger("flwr")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    yield
    logger.setLevel(level)


Launch = Callable[..., Program]


@pytest.fixture
def launch(project: Project, prefork: Prefork) -> Iterator[Launch]:
    """Starts processes, by the command ``under`` where there is one; each is killed at the end."""
    programs: list[Program] = []

    def starting(entry: str, *arguments: str, under: tuple[str, ...] = ()) -> Program:
        log = project.root / f"{len(programs)}.log"
        with log.open("w") as stream:
            env = os.environ | {"OMP_NUM_THREADS": "1"}
            words = (entry, *arguments)
            process = (
                subprocess.Popen(
                    [*under, sys.executable, "-c", RUN_VERB, *words],
                    cwd=project.root,
                    stdout=stream,
                    stderr=stream,
                    text=True,
                    env=env,
                )
                if under
                else prefork.start(
                    words, cwd=project.root, env=env, stdout=stream, stderr=stream, code=RUN_VERB
                )
            )
        programs.append(Program(process, log, words))
        return programs[-1]

    yield starting
    for program in programs:
        if program.process.poll() is None:
            program.process.send_signal(signal.SIGCONT)
            program.process.kill()
        program.process.wait(20)


@pytest.fixture
def launch_server(project: Project, launch: Launch) -> Callable[..., Program]:
    """Starts ``fedcore server start`` and waits until it listens."""

    def starting(*overrides: str, name: str = "trial", under: tuple[str, ...] = ()) -> Program:
        config = project.root / "run.toml"
        config.write_text(
            f'name = "{name}"\ntask = "task.py"\nseed = 1\n'
            "[federation]\nrounds = 2\ndeadline_s = 60.0\n[client]\nbatch_size = 8\n"
        )
        sets = [part for override in overrides for part in ("--set", override)]
        program = launch(
            "server.live.commands:server",
            *("server", "start", str(config), "--identity", str(project.root / "server")),
            *("--listen", f"127.0.0.1:{project.port}", "--wake-port", "0"),
            *("--runs", str(project.root / "runs"), "--json", *sets),
            under=under,
        )
        program.wait_for("listening on")
        return program

    return starting


@pytest.fixture
def launch_device(project: Project, launch: Launch) -> Callable[..., Program]:
    """Starts ``fedcore client start`` with the identity ``name``."""

    def starting(name: str, *arguments: str) -> Program:
        project.device(name)
        return launch(
            "edge_client.agent.commands:start",
            *("start", "--kit", str(project.root / name), "--task", str(project.task)),
            *arguments,
        )

    return starting
