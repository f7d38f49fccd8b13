"""Stock Flower for the deployment benchmark: its own SuperLink, SuperNodes and command line."""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w

from benchmarks.deployment_project import ONE_THREAD, SAMPLE_S, Memory, Program, running
from benchmarks.measure import ProgramFailed

APP = Path(__file__).parent / "peers" / "deployment_app"
_BIN = Path(sys.executable).parent
_LIMIT_S = 900.0


@dataclass(frozen=True)
class Stock:
    """A SuperLink that is up."""

    root: Path
    address: str
    program: Program
    environment: dict[str, str]

    @property
    def notes(self) -> Path:
        """Where the ServerApp writes what it does."""
        return self.root / "notes.jsonl"

    def noted(self, event: str) -> list[dict[str, Any]]:
        """What it has written of one kind."""
        if not self.notes.exists():
            return []
        lines = [json.loads(line) for line in self.notes.read_text().splitlines()]
        return [line for line in lines if line["event"] == event]

    def wait_for(self, event: str, *others: Program) -> dict[str, Any]:
        """Waits until the ServerApp has noted ``event``, and returns the last such note."""
        end = time.monotonic() + _LIMIT_S
        while not (found := self.noted(event)):
            ended = [one for one in (self.program, *others) if one.process.poll() not in (None, 0)]
            if ended or time.monotonic() > end:
                said = " / ".join(one.last_words() for one in (self.program, *others))
                raise ProgramFailed(f"Flower: no {event!r} was noted. It said: {said}")
            time.sleep(0.02)
        return found[-1]


@contextmanager
def superlink(root: Path, *, core: int | None = None) -> Iterator[Stock]:
    """Flower's server on a free port, without TLS; what it starts is on its core, too."""
    root.mkdir(parents=True)
    port = _free_port()
    address = f"127.0.0.1:{port}"
    connection = {"address": address, "insecure": True}
    (root / "config.toml").write_text(tomli_w.dumps({"superlink": {"here": connection}}))
    environment = {
        **ONE_THREAD,
        "PATH": f"{_BIN}{os.pathsep}{os.environ['PATH']}",  # it starts its own programs by name
        "FLWR_HOME": str(root),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    }
    listen = ("--host", "127.0.0.1", "--port", str(port))
    command = [_BIN / "flower-superlink", "--insecure", *listen]
    with running(command, root, "superlink", environment=environment, core=core) as program:
        end = time.monotonic() + 60
        while time.monotonic() < end:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        yield Stock(root, address, program, environment)


def supernode(stock: Stock, place: int) -> Any:
    """Flower's client process, as a context of its `Program`."""
    command = [
        *(_BIN / "flower-supernode", "--insecure", "--superlink", stock.address),
        *("--host", "127.0.0.1", "--port", str(_free_port())),
    ]
    name = f"supernode-{place}"
    return running(command, stock.root, name, environment=stock.environment)


def start_run(stock: Stock, **config: object) -> Any:
    """Types ``flwr run``, as a context of its `Program`."""
    values = {"out": str(stock.notes), **config}
    text = " ".join(f"{name}={json.dumps(value)}" for name, value in values.items())
    command = [_BIN / "flwr", "run", APP, "here", "--stream", "--run-config", text]
    return running(command, stock.root, "flwr-run", environment=stock.environment)


def seconds_per_round(root: Path, *, rounds: int, nodes: int) -> float:
    """Mean time of a round of training and evaluation over real SuperNodes, after a first one."""
    with superlink(root) as stock, ExitStack() as stack:
        for place in range(nodes):
            stack.enter_context(supernode(stock, place))
        time.sleep(5.0)  # they have come
        run = stack.enter_context(start_run(stock, rounds=1 + rounds, nodes=nodes, evaluate=True))
        stock.wait_for("over", run)
        ended = stock.noted("ended")
    if len(ended) != 1 + rounds:
        raise ProgramFailed(f"Flower: {len(ended)} rounds of {1 + rounds} came to their end")
    return float(ended[-1]["at_s"] - ended[0]["at_s"]) / rounds


def memory(root: Path, *, cohort: int, parameters: int) -> Memory:
    """A round of as many updates as ``cohort``, sent at once by nodes that train nothing.

    The ServerApp has the global model and waits for the last of its nodes when the first figure is
    taken.
    """
    with superlink(root) as stock, ExitStack() as stack:
        config = {"rounds": 1, "nodes": cohort, "evaluate": False, "parameters": parameters}
        run = stack.enter_context(start_run(stock, **config))
        stock.wait_for("loaded", run)
        stack.enter_context(_nodes(stock, "most", cohort - 1))
        time.sleep(15.0)
        before_bytes = peak_bytes = stock.program.pss_bytes()
        started = time.monotonic()
        stack.enter_context(_nodes(stock, "last", 1))
        while not stock.noted("over"):
            peak_bytes = max(peak_bytes, stock.program.pss_bytes())
            if run.process.poll() is not None or time.monotonic() - started > _LIMIT_S:
                raise ProgramFailed(
                    f"Flower: the round did not end, after {time.monotonic() - started:.0f} s and "
                    f"a rise by {(peak_bytes - before_bytes) / 1e6:.0f} MB: {_last_error(run)}"
                )
            time.sleep(0.05)
        if (taken := stock.noted("over")[-1]["updates"]) != cohort:
            raise ProgramFailed(f"Flower: {taken} of {cohort} updates were taken")
        return Memory(before_bytes, peak_bytes, time.monotonic() - started)


@dataclass(frozen=True)
class Taken:
    """How updates were taken in."""

    seconds: float
    """From the first byte that was pushed until the round was over."""
    cpu_s: float
    """What the server's processes computed meanwhile, others on its core left out."""
    idle_bytes: int
    """Memory of all of a server's processes with the model loaded."""
    peak_bytes: int


def ingest(root: Path, *, cohort: int, parameters: int, server: int, senders: int) -> Taken:
    """A round of ``cohort`` updates that are all ready before the first is pushed.

    ``server`` and ``senders`` are the cores that each side is held to.
    """
    with superlink(root, core=server) as stock, ExitStack() as stack:
        config = {"rounds": 1, "nodes": cohort, "evaluate": False, "parameters": parameters}
        run = stack.enter_context(start_run(stock, **config))
        stock.wait_for("loaded", run)
        idle_bytes = peak_bytes = stock.program.pss_bytes()
        nodes = stack.enter_context(_nodes(stock, "nodes", cohort, together=True, core=senders))
        begun_s, cpu_s = 0.0, 0.0
        while not stock.noted("over"):
            if not begun_s and nodes.events("pushing"):
                begun_s = stock.program.family_cpu_s()
            cpu_s = stock.program.family_cpu_s()  # a process that ends is counted no more
            peak_bytes = max(peak_bytes, stock.program.pss_bytes())
            if run.process.poll() is not None or nodes.process.poll() is not None:
                raise ProgramFailed(f"Flower: the round did not end: {_last_error(run)}")
            time.sleep(SAMPLE_S)
        over = stock.noted("over")[-1]
        if over["updates"] != cohort:
            raise ProgramFailed(f"Flower: {over['updates']} of {cohort} updates were taken")
        (pushing,) = nodes.events("pushing")
        return Taken(over["at_s"] - pushing["at_s"], cpu_s - begun_s, idle_bytes, peak_bytes)


def _last_error(run: Program) -> str:
    """What ``flwr run`` showed of the failure of its ServerApp."""
    lines = run.said.read_text(errors="replace").splitlines()
    return next((line for line in reversed(lines) if "Error: " in line), "it does not say why")


def _nodes(
    stock: Stock, name: str, count: int, *, together: bool = False, core: int | None = None
) -> Any:
    command = [
        *(sys.executable, "-m", "benchmarks.peers.deployment_nodes"),
        *("--superlink", stock.address, "--count", str(count)),
        *(["--together"] if together else []),
    ]
    environment = stock.environment | {"PYTHONPATH": str(Path(__file__).parent.parent)}
    return running(command, stock.root, name, environment=environment, core=core)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])
