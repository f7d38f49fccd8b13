"""Ingest: how fast a live server takes in large updates that are sent at once, and small ones.

``make bench NAME=ingest`` runs it; ``runs/bench/ingest.json`` has the figures. The server is held
to one core and those who send to another, which has this process, too: reading the memory of a
server takes as long as it is large. All updates are ready before the first byte is pushed, and the
time ends when the round is over: verified, in the journal, added up, its model committed. CPU time
is told beside it: it stays the same where others use the machine, too.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from benchmarks import deployment_flower as flower
from benchmarks.deployment import Found, machine, table
from benchmarks.deployment_flower import Taken
from benchmarks.deployment_project import ROOT, SAMPLE_S, Program, load, make_project, server
from benchmarks.figures import at_least, at_most, row
from benchmarks.measure import ProgramFailed
from fedcore.crypto.kit import client_context, load_kit
from fedcore.crypto.roster import load_server_identity, server_context
from fedcore.files import write_json

MB = 1_000_000
PARAMETERS = 10_000_000
UPDATE_BYTES = 4 * PARAMETERS
SERVER, SENDERS = 0, 1
"""Cores."""
OURS, STOCK, EARLIER, LIMIT = "fedcore", "flower", "earlier", "limit"
_LIMIT_S = 900.0


@dataclass(frozen=True)
class Sizes:
    """How much is sent, and how often."""

    cohorts: tuple[int, ...]
    fleet: int
    repeats: int
    stock: bool
    earlier: Path | None = None
    """A checkout of an earlier version, with this benchmark's files, to be measured beside."""


FULL = Sizes(cohorts=(8, 64), fleet=500, repeats=3, stock=True)
QUICK = Sizes(cohorts=(4,), fleet=40, repeats=1, stock=False)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark; 1 when a check does not hold or a system failed."""
    parser = argparse.ArgumentParser(prog="benchmarks.ingest", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small sizes, and without Flower")
    parser.add_argument("--cohorts", type=int, nargs="*", help="updates of 40 MB at once")
    parser.add_argument("--fleet", type=int, help="devices with small updates; 0 for none")
    parser.add_argument("--repeats", type=int)
    parser.add_argument("--without-flower", action="store_true")
    parser.add_argument("--earlier", type=Path, help="a checkout that is measured beside")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    options = parser.parse_args(arguments)
    sizes = QUICK if options.quick else FULL
    sizes = Sizes(
        cohorts=sizes.cohorts if options.cohorts is None else tuple(options.cohorts),
        fleet=sizes.fleet if options.fleet is None else options.fleet,
        repeats=options.repeats or sizes.repeats,
        stock=sizes.stock and not options.without_flower,
        earlier=options.earlier.resolve() if options.earlier else None,
    )
    scratch = (options.out / "ingest").resolve()
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    runs, described = Runs(), machine()
    for repeat in range(sizes.repeats):
        found = Found()
        try:
            with _held_to(SENDERS):
                measure(scratch / str(repeat), sizes, runs)
        except ProgramFailed as error:
            found.failures.append(str(error))
        shutil.rmtree(scratch / str(repeat), ignore_errors=True)
        summarise(runs, sizes, found)
        told = {"machine": described, "loads": runs.loads, **asdict(found)}
        ended = datetime.now(UTC).isoformat(timespec="seconds")
        write_json(options.out / "ingest.json", {"ended": ended, **told})
        if found.failures:
            break
    print(table(found), flush=True)
    return 0 if not found.failures and all(one.holds for one in found.checks) else 1


@dataclass
class Runs:
    """What was measured so far, by system and cohort."""

    taken: dict[tuple[str, int], list[Taken]] = field(default_factory=dict)
    fleets: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    """Seconds of a round of the fleet, and of the server's CPU until it was over, by system."""
    limits: list[dict[str, float]] = field(default_factory=list)
    """Milliseconds of each pass over 40 MB, by what it does."""
    loads: list[float] = field(default_factory=list)
    """Of the machine, when each repeat began."""

    def add(self, system: str, cohort: int, taken: Taken) -> None:
        """Notes a run, and says so."""
        self.taken.setdefault((system, cohort), []).append(taken)
        rate = cohort * UPDATE_BYTES / taken.seconds / MB
        core = cohort * UPDATE_BYTES / taken.cpu_s / MB
        print(
            f"{system} {cohort}: {taken.seconds:.2f} s, {rate:.0f} MB/s; {taken.cpu_s:.2f} s of "
            f"CPU, {core:.0f} MB/s a core",
            flush=True,
        )


def measure(root: Path, sizes: Sizes, runs: Runs) -> None:
    """One repeat: every system in turn, so that what slows the machine slows all of them."""
    root.mkdir(parents=True)
    runs.loads.append(os.getloadavg()[0])
    runs.limits.append(passes(root))
    for cohort in sizes.cohorts:
        runs.add(OURS, cohort, ours(root / f"fedcore-{cohort}", cohort, ROOT))
        if sizes.earlier is not None:
            taken = ours(root / f"earlier-{cohort}", cohort, sizes.earlier)
            runs.add(EARLIER, cohort, taken)
        if sizes.stock:
            taken = flower.ingest(
                root / f"flower-{cohort}",
                cohort=cohort,
                parameters=PARAMETERS,
                server=SERVER,
                senders=SENDERS,
            )
            runs.add(STOCK, cohort, taken)
    sources = {OURS: ROOT, EARLIER: sizes.earlier}
    for system, source in sources.items():
        if sizes.fleet and source is not None:
            found = small(root / f"fleet-{system}", sizes.fleet, source)
            runs.fleets.setdefault(system, []).append(found)
            print(f"{system} {sizes.fleet} small: {found[0]:.2f} s, {found[1]:.2f} s of CPU")


def summarise(runs: Runs, sizes: Sizes, found: Found) -> None:
    """Rows and checks."""
    for (system, cohort), taken in runs.taken.items():
        workload = f"{cohort} updates"
        for metric, unit, values in (
            ("seconds", "s", [one.seconds for one in taken]),
            ("bytes_per_s", "bytes/s", [cohort * UPDATE_BYTES / one.seconds for one in taken]),
            ("bytes_per_cpu_s", "bytes/s", [cohort * UPDATE_BYTES / one.cpu_s for one in taken]),
            ("risen_bytes", "bytes", [one.peak_bytes - one.idle_bytes for one in taken]),
        ):
            found.rows.append(row(system, workload, metric, unit, values))
    for cohort in sizes.cohorts:
        mine = runs.taken.get((OURS, cohort), [])
        for system, called in ((STOCK, "Flower's"), (EARLIER, "the earlier")):
            pairs = zip(mine, runs.taken.get((system, cohort), []), strict=False)
            if ratios := [their.seconds / our.seconds for our, their in pairs]:
                name = f"{called} time over ours for {cohort} updates"
                found.checks.append(at_least(name, ratios, 4.0))
        if mine:
            risen = [(one.peak_bytes - one.idle_bytes) / MB for one in mine]
            name = f"memory above idle with {cohort} updates, MB"
            found.checks.append(at_most(name, risen, 200.0))
    workload = f"{sizes.fleet} devices"
    for system, fleets in runs.fleets.items():
        seconds = [one for one, _ in fleets]
        found.rows.append(row(system, workload, "seconds", "s", seconds))
        found.rows.append(row(system, workload, "cpu_s", "s", [cpu_s for _, cpu_s in fleets]))
        if system == OURS:
            found.checks.append(at_most(f"a round of {workload}, s", seconds, 2.5))
    for name in runs.limits[0] if runs.limits else ():
        found.rows.append(row(LIMIT, "40 MB", name, "ms", [one[name] for one in runs.limits]))
    if runs.limits:
        best = [UPDATE_BYTES / (sum(one.values()) / 1000) for one in runs.limits]
        found.rows.append(row(LIMIT, "one pass of each", "bytes_per_s", "bytes/s", best))


def ours(root: Path, cohort: int, source: Path) -> Taken:
    """A round of ``cohort`` updates of 40 MB, by the fedcore of the checkout ``source``."""
    project = make_project(root, cohort, parameters=PARAMETERS)
    settings = {"rounds": 1, "cohort": cohort, "deadline_s": _LIMIT_S}
    with ExitStack() as stack:
        program = stack.enter_context(
            server(project, "trial", core=SERVER, source=source, **settings)
        )
        program.wait_for("listening on")
        time.sleep(5.0)  # the model is loaded
        idle_bytes = peak_bytes = program.pss_bytes()
        senders = stack.enter_context(
            load(
                project,
                "senders",
                count=cohort,
                parameters=PARAMETERS,
                together=True,
                core=SENDERS,
                source=source,
            )
        )
        ended_s, begun_cpu_s, cpu_s, sampled_s = 0.0, 0.0, 0.0, 0.0
        while not ended_s or program.process.poll() is None:
            if not begun_cpu_s and senders.events("pushing"):
                begun_cpu_s = program.family_cpu_s()
            if not ended_s and program.events("round_finished"):
                ended_s, cpu_s = time.monotonic(), program.family_cpu_s() - begun_cpu_s
            if time.monotonic() - sampled_s >= SAMPLE_S:
                peak_bytes, sampled_s = max(peak_bytes, program.pss_bytes()), time.monotonic()
            _still_running(program, senders)
            time.sleep(0.005)
        (event,) = program.events("round_finished")
        if event["updates"] != cohort:
            raise ProgramFailed(f"{event['updates']} of {cohort} updates were taken: {event}")
        begun = [one["at_s"] for one in senders.events("pushing") if one["devices"] == 1]
        return Taken(ended_s - begun[0], cpu_s, idle_bytes, peak_bytes)


@contextmanager
def _held_to(core: int) -> Iterator[None]:
    """Holds this process to a core."""
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)


def small(root: Path, count: int, source: Path) -> tuple[float, float]:
    """Seconds of a round of many devices with small updates, as the server tells them.

    And the CPU time that the server took for it: from the first device's pull.
    """
    project = make_project(root, count)
    settings = {"rounds": 1, "cohort": count, "deadline_s": _LIMIT_S}
    with ExitStack() as stack:
        program = stack.enter_context(
            server(project, "trial", core=SERVER, source=source, **settings)
        )
        program.wait_for("listening on")
        senders = stack.enter_context(
            load(project, "senders", count=count, core=SENDERS, source=source)
        )
        begun_s = 0.0
        while not program.events("round_finished"):
            if not begun_s and senders.events("pulled"):
                begun_s = program.family_cpu_s()
            _still_running(program, senders)
            time.sleep(0.02)
        cpu_s = program.family_cpu_s() - begun_s
        (event,) = program.events("round_finished")
    if event["updates"] != count:
        raise ProgramFailed(f"{event['updates']} of {count} devices completed the round: {event}")
    return float(event["seconds"]), cpu_s


def _still_running(program: Program, senders: Program) -> None:
    for one in (program, senders):
        if one.process.poll() not in (None, 0):
            raise ProgramFailed(f"the round did not end: {one.last_words()}")


def passes(root: Path) -> dict[str, float]:
    """Milliseconds that one pass of each kind over 40 MB takes on one core.

    No server that decrypts, hashes, writes, checks and adds up each byte once is faster than all of
    them together, on one core.
    """
    rng = np.random.default_rng(0)
    values, base = rng.random(PARAMETERS, np.float32), rng.random(PARAMETERS, np.float32)
    raw = values.tobytes()
    sums = np.zeros(PARAMETERS, np.int64)

    def write() -> None:
        with tempfile.TemporaryFile(dir=root) as file:
            for place in range(0, len(raw), 2**18):
                file.write(raw[place : place + 2**18])
            file.flush()
            os.fsync(file.fileno())

    def check() -> None:
        for place in range(0, PARAMETERS, 2**16):
            part = slice(place, place + 2**16)
            gap = np.subtract(values[part], base[part], dtype=np.float64)
            float(np.einsum("i,i->", gap, gap))  # unlike gap @ gap in this thread alone

    def add() -> None:
        for place in range(0, PARAMETERS, 2**16):
            part = slice(place, place + 2**16)
            scaled = np.multiply(values[part], 2.0**36, dtype=np.float64)
            np.rint(scaled, out=scaled)
            sums[part] += scaled.astype(np.int64)

    with _held_to(SERVER):
        return {
            "tls_ms": _tls_ms(root / "tls", raw),
            "sha256_ms": _ms(lambda: hashlib.sha256(raw)),
            "write_and_fsync_ms": _ms(write),
            "check_and_norm_ms": _ms(check),
            "exact_sum_ms": _ms(add),
        }


def _ms(work: Callable[[], object]) -> float:
    times = []
    for _ in range(5):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return min(times) * 1000


def _tls_ms(root: Path, raw: bytes) -> float:
    """CPU time in which one thread reads 40 MB over TLS from another core."""
    project = make_project(root, 1)
    taking = server_context(load_server_identity(root / "server"))
    giving = client_context(load_kit(project.kit("edge-0")))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = int(listener.getsockname()[1])

        def send() -> None:
            os.sched_setaffinity(0, {SENDERS})  # of this thread alone
            with (
                socket.create_connection(("127.0.0.1", port)) as plain,
                giving.wrap_socket(plain, server_hostname="127.0.0.1") as wrapped,
            ):
                for _ in range(5):
                    wrapped.sendall(raw)
                wrapped.recv(1)

        sender = threading.Thread(target=send)
        sender.start()
        plain, _ = listener.accept()
        with taking.wrap_socket(plain, server_side=True) as wrapped:
            times, buffer = [], bytearray(2**16)
            for _ in range(5):
                began, left = time.thread_time(), len(raw)
                while left:
                    left -= wrapped.recv_into(buffer, min(left, len(buffer)))
                times.append(time.thread_time() - began)
            wrapped.sendall(b"\0")
        sender.join()
    return min(times) * 1000


if __name__ == "__main__":
    sys.exit(main())
