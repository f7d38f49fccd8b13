"""Inference over the network: fedcore beside a minimal server, kserve, mlserver, and an echo.

All answer one model of `examples/digits` by onnxruntime on one thread, to tritonclient. Systems
take turns within each repeat, so that a machine that is slower for a while slows all of them.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from benchmarks.deployment import Found
from benchmarks.figures import at_least, at_most, row
from benchmarks.inference_models import release
from benchmarks.measure import ProgramFailed, pss_bytes, tree

OURS, MINIMAL, ECHO, KSERVE, MLSERVER = "fedcore", "minimal", "echo", "kserve", "mlserver"
UNCOUNTED = "fedcore, no reference"
"""It counts requests, but no rows in bins."""
VENVS = {KSERVE: Path(".venv-kserve"), MLSERVER: Path(".venv-mlserver")}
_START_S = 120.0
_LOAD = (sys.executable, "-m", "benchmarks.peers.serving_load")
_PROCESSES = 2
"""Loads that run side by side at concurrencies above 1: one alone would be the limit."""


@dataclass(frozen=True)
class Amounts:
    """How much is measured."""

    repeats: int
    calls: int
    concurrencies: tuple[int, ...]


FULL = Amounts(repeats=5, calls=2000, concurrencies=(1, 8, 64))
QUICK = Amounts(repeats=1, calls=200, concurrencies=(1, 64))


@dataclass
class Measured:
    """Figures of one system on one workload, a value for each repeat."""

    p50_us: list[float] = field(default_factory=list)
    p99_us: list[float] = field(default_factory=list)
    per_s: list[float] = field(default_factory=list)
    processor_us: list[float] = field(default_factory=list)
    """Processor time of the server for each request."""


UNITS = {"p50_us": "us", "p99_us": "us", "per_s": "1/s", "processor_us": "us"}


@dataclass(frozen=True)
class System:
    """A server that can be started."""

    name: str
    command: tuple[str, ...]
    grpc: str
    http: str | None
    forms: tuple[str, ...] = ()
    """How it takes tensors over HTTP: ``json`` or ``binary``."""
    environment: dict[str, str] = field(default_factory=dict)


def measure(root: Path, quick: bool, found: Found) -> None:
    """Measures every system that is installed; those that are not are noted."""
    amounts = QUICK if quick else FULL
    released = release(root, "digits", reference=True)
    plain = release(root, "digits")
    (onnx,) = released.store.glob("models/digits/*/model.onnx")
    systems = _systems(released.store, plain.store, onnx, found)
    results: dict[tuple[str, str, int], Measured] = {}
    started: dict[str, list[float]] = {system.name: [] for system in systems}
    memory: dict[str, list[float]] = {system.name: [] for system in systems}
    for repeat in range(amounts.repeats):
        order = systems[repeat % len(systems) :] + systems[: repeat % len(systems)]
        for system in order:
            _measure_one(root, system, amounts, results, started, memory)
    for name in started:
        found.rows.append(row(name, "digits", "start_up_s", "s", started[name]))
        found.rows.append(row(name, "digits", "memory_bytes", "bytes", memory[name]))
    for (name, transport, ahead), measured in results.items():
        workload = f"digits, {transport}, {ahead} at a time"
        for metric, unit in UNITS.items():
            found.rows.append(row(name, workload, metric, unit, getattr(measured, metric)))
    _check(results, found)


def _check(results: dict[tuple[str, str, int], Measured], found: Found) -> None:
    def ratios(metric: str, over: str, under: str, ahead: int) -> list[float]:
        pairs = (results.get((name, "grpc", ahead), Measured()) for name in (over, under))
        ours, theirs = (getattr(measured, metric) for measured in pairs)
        return [one / other for one, other in zip(ours, theirs, strict=False)]

    def check(kind: object, name: str, values: Sequence[float], bound: float) -> None:
        if values:
            found.checks.append(kind(name, values, bound))  # type: ignore[operator]

    p50 = "p50_us"
    check(at_most, "p50 over the minimal server's", ratios(p50, OURS, MINIMAL, 1), 1.15)
    counted = "p50 over that of a release without a reference"
    check(at_most, counted, ratios(p50, OURS, UNCOUNTED, 1), 1.05)
    check(at_most, "p50 over the echo server's", ratios(p50, OURS, ECHO, 1), 1.5)
    check(at_least, "kserve's p50 over ours", ratios(p50, KSERVE, OURS, 1), 1.0)
    check(at_least, "mlserver's p50 over ours", ratios(p50, MLSERVER, OURS, 1), 1.6)
    more, tail = ratios("per_s", OURS, KSERVE, 64), ratios("p99_us", OURS, KSERVE, 64)
    check(at_least, "throughput over kserve's, 64 at a time", more, 3.0)
    check(at_most, "p99 over kserve's, 64 at a time", tail, 1.0)


def _systems(store: Path, plain: Path, onnx: Path, found: Found) -> list[System]:
    def addresses() -> tuple[str, str]:
        return str(_free_port()), str(_free_port())

    python = sys.executable
    both, systems = ("json", "binary"), []
    for name, served in ((OURS, store), (UNCOUNTED, plain)):
        grpc, http = addresses()
        ports = ("--grpc-port", grpc, "--http-port", http)
        command = (python, "-m", "fedcore.cli", "device", "serve", "--store", str(served), *ports)
        at = (f"127.0.0.1:{grpc}", f"127.0.0.1:{http}")
        systems.append(System(name, command, *at, both if name == OURS else ()))
    for name, model in ((MINIMAL, str(onnx)), (ECHO, "echo")):
        grpc, _ = addresses()
        command = (python, "-m", "benchmarks.peers.serving_minimal", model, grpc)
        systems.append(System(name, command, f"127.0.0.1:{grpc}", None))
    for name, venv in VENVS.items():
        peer = venv.absolute() / "bin" / "python"
        if not peer.exists():
            found.notes.append(f"{name}: not measured, {venv} is not there")
            continue
        grpc, http = addresses()
        command = (str(peer), "-m", f"benchmarks.peers.serving_{name}", str(onnx), grpc, http)
        forms = ("binary",) if name == KSERVE else ("json",)
        systems.append(System(name, command, f"127.0.0.1:{grpc}", f"127.0.0.1:{http}", forms))
    return systems


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def _measure_one(
    root: Path,
    system: System,
    amounts: Amounts,
    results: dict[tuple[str, str, int], Measured],
    started: dict[str, list[float]],
    memory: dict[str, list[float]],
) -> None:
    with _serving(root, system) as (process, start_up_s):
        started[system.name].append(start_up_s)
        places = [("grpc", system.grpc), *((form, system.http or "") for form in system.forms)]
        for transport, address in places:
            for ahead in amounts.concurrencies:
                into = results.setdefault((system.name, transport, ahead), Measured())
                _load(root, process, transport, address, amounts.calls, ahead, into)
        memory[system.name].append(float(sum(map(pss_bytes, tree(process.pid)))))


@contextmanager
def _serving(root: Path, system: System) -> Iterator[tuple[subprocess.Popen[bytes], float]]:
    """Starts a server, and yields it with the seconds until its first answer."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path.cwd())}
    with (root / f"{system.name}.log").open("wb") as log:
        began_s = time.monotonic()
        process = subprocess.Popen(
            system.command, env=environment, stdout=log, stderr=log, start_new_session=True
        )
        try:
            first = _ask(("grpc", system.grpc, "once", "1"), log, limit_s=_START_S)
            yield process, float(json.loads(first)["first_s"]) - began_s
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _ask(arguments: Sequence[str], log: IO[bytes], *, limit_s: float) -> str:
    try:
        done = subprocess.run(
            [*_LOAD, *arguments], stdout=subprocess.PIPE, stderr=log, timeout=limit_s, check=True
        )
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        said = Path(log.name).read_text(errors="replace")[-500:]
        raise ProgramFailed(f"{' '.join(arguments)}: {type(error).__name__}: {said}") from None
    return done.stdout.decode()


def _load(
    root: Path,
    server: subprocess.Popen[bytes],
    transport: str,
    address: str,
    calls: int,
    ahead: int,
    into: Measured,
) -> None:
    count = 1 if ahead == 1 else _PROCESSES
    each = (transport, address, str(calls // count), str(ahead // count))
    before_s = _processor_s(server.pid)
    loads = [
        subprocess.Popen([*_LOAD, *each], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for _ in range(count)
    ]
    times: list[float] = []
    per_s = 0.0
    for load in loads:
        out, said = load.communicate(timeout=600)
        if load.returncode:
            raise ProgramFailed(f"{' '.join(each)}: {said.decode(errors='replace')[-500:]}")
        result = json.loads(out)
        times += result["times_us"]
        per_s += len(result["times_us"]) / result["took_s"]
    spent_s = _processor_s(server.pid) - before_s
    cuts = statistics.quantiles(times, n=100)
    into.p50_us.append(cuts[49])
    into.p99_us.append(cuts[98])
    into.per_s.append(per_s)
    into.processor_us.append(1e6 * spent_s / (len(times) + 200 * count))


def _processor_s(process: int) -> float:
    """Processor time of a process and its descendants, in seconds."""
    total = 0.0
    for one in tree(process):
        stat = Path(f"/proc/{one}/stat")
        if stat.exists():
            fields = stat.read_text().rpartition(")")[2].split()
            total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return total
