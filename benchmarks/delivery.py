"""Delivery: a fleet that updates at once, and a large model over a connection that is cut.

``make bench NAME=delivery``. The devices of the fleet are threads of one process, each with an
identity, a connection over mutual TLS and a store of its own; they wait for the release on the
service's stream, and install it with every check, the self-test in a process of its own included.
The service is another process. ``runs/bench/delivery.json`` has the figures.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import platform
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from fedcore.rpc.tls import require_tls_1_3, silence_grpc_core

require_tls_1_3()
silence_grpc_core()

from benchmarks.figures import Check, Row, at_most, row  # noqa: E402
from benchmarks.measure import processor  # noqa: E402
from edge_client.delivery import update as updating  # noqa: E402
from edge_client.delivery.network import DeliveryEndpoint, DeliveryLink  # noqa: E402
from fedcore.files import write_json  # noqa: E402
from tests.adversarial.conftest import World, initialised, matmul_draft  # noqa: E402
from tests.cutting import cutting  # noqa: E402
from tests.delivering import HOST, Delivering  # noqa: E402

LARGE_BYTES = 100_000_000
CUTS = 20
RESENT = 0.01
"""Bound on the share of a large model that is sent again."""
GROWTH_BYTES = 64 << 20
"""Bound on the growth of the service's memory while the fleet updates."""
_TESTS_AT_ONCE = 4
_PADDING = 1_000_000


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark; 1 when a check does not hold."""
    parser = argparse.ArgumentParser(prog="benchmarks.delivery", description=__doc__)
    parser.add_argument("--devices", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=5, help="of the large model")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    options = parser.parse_args(arguments)
    rows: list[Row] = []
    checks: list[Check] = []
    with tempfile.TemporaryDirectory(prefix="fedcore-delivery-") as folder:
        for part in (
            lambda: large(Path(folder) / "large", options.repeats),
            lambda: fleet(Path(folder) / "fleet", options.devices),
        ):
            found = part()
            rows += found[0]
            checks += found[1]
    result = {
        "machine": {
            "processor": processor(),
            "cores": len(os.sched_getaffinity(0)),
            "load": os.getloadavg()[0],
            "versions": {
                "python": platform.python_version(),
                **{name: metadata.version(name) for name in ("fedcore", "grpcio", "tuf")},
            },
        },
        "rows": [asdict(one) for one in rows],
        "checks": [asdict(one) for one in checks],
    }
    options.out.mkdir(parents=True, exist_ok=True)
    write_json(options.out / "delivery.json", result)
    for one in rows:
        print(
            f"{one.system:<10} {one.workload:<22} {one.metric:<28} {one.median:>14,.3f} {one.unit}"
        )
    for check in checks:
        print(f"{check.name}: {check.value:.6g}, bound {check.bound:g}: {check.holds}")
    return 0 if all(check.holds for check in checks) else 1


def large(folder: Path, repeats: int) -> tuple[list[Row], list[Check]]:
    """A file of 100 MB: whole, and over connections that are reset 20 times.

    What is sent again is what passes the network beyond an uncut transfer, which has TLS and HTTP/2
    around the content, too.
    """
    project, raw = Delivering(folder), os.urandom(LARGE_BYTES)
    digest, kit = hashlib.sha256(raw).hexdigest(), project.device("edge-1")
    place = folder / "repository" / "targets" / "models" / "large" / "1"
    place.mkdir(parents=True)
    (folder / "repository" / "metadata").mkdir()
    (place / f"{digest}.model.onnx").write_bytes(raw)
    name = f"targets/models/large/1/{digest}.model.onnx"

    def fetched(port: int, after: Sequence[int]) -> tuple[float, int, int]:
        with cutting(port, after) as line:
            began, found = time.perf_counter(), hashlib.sha256()
            with DeliveryLink(kit, DeliveryEndpoint(HOST, line.port)) as link:
                for chunk in link.source(name, 0):
                    found.update(chunk)
            seconds = time.perf_counter() - began
        assert found.hexdigest() == digest
        return seconds, sum(line.passed_bytes), line.cuts

    shares, whole_s, cut_s = [], [], []
    with serving(project, folder / "repository") as (port, _):
        for repeat in range(repeats):
            rng = np.random.default_rng(repeat)
            whole, passed, _ = fetched(port, ())
            after = rng.integers(2_000_000, 4_800_000, CUTS).tolist()
            cut, again, cuts = fetched(port, after)
            assert cuts == CUTS
            whole_s.append(whole)
            cut_s.append(cut)
            shares.append((again - passed) / LARGE_BYTES)
    workload = "100 MB"
    return [
        row("fedcore", workload, "whole", "s", whole_s),
        row("fedcore", f"{workload}, {CUTS} cuts", "seconds", "s", cut_s),
        row("fedcore", f"{workload}, {CUTS} cuts", "sent again", "share", shares),
    ], [at_most(f"share of {workload} sent again over {CUTS} cuts", shares, RESENT)]


def fleet(folder: Path, devices: int) -> tuple[list[Row], list[Check]]:
    """A fleet that waits on the stream, and installs a release when it comes."""
    world, project = initialised(folder / "world"), Delivering(folder / "project")
    world.publish(1.0)
    names = [f"edge-{number:03d}" for number in range(devices)]
    kits = project.devices(names)
    tested, slots = updating.self_test, threading.Semaphore(_TESTS_AT_ONCE)

    def in_turn(*given: Any, **more: Any) -> float:
        with slots:  # a fleet has a processor each; here they share this machine's
            return tested(*given, **more)

    updating.self_test = in_turn
    done: dict[str, float] = {}
    failed: list[str] = []
    ready = threading.Barrier(devices + 1)
    with serving(project, world.repository) as (port, resident_bytes):

        def device(name: str, kit: Path) -> None:
            try:
                _one(world, name, kit, port, ready, done)
            except BaseException as error:
                failed.append(f"{name}: {type(error).__name__}: {error}")
                ready.abort()

        threads = [
            threading.Thread(target=device, args=pair) for pair in zip(names, kits, strict=True)
        ]
        for thread in threads:
            thread.start()
        ready.wait(600)
        before, peak = resident_bytes(), 0
        world_draft = matmul_draft(2.0, padding=_PADDING)
        published_s = _publish(world, world_draft)
        while any(thread.is_alive() for thread in threads):
            peak = max(peak, resident_bytes())
            time.sleep(0.1)
    updating.self_test = tested
    print(*failed[:3], sep="\n", file=sys.stderr)
    lasted_s = [at_s - published_s for at_s in done.values()]
    workload = f"{devices} devices, {_PADDING // 1_000_000} MB"
    rows = [
        row("fedcore", workload, "publish to answer", "s", lasted_s),
        row("fedcore", workload, "publish to last answer", "s", [max(lasted_s)]),
        row("fedcore", workload, "memory before", "bytes", [before]),
        row("fedcore", workload, "memory at most", "bytes", [peak]),
    ]
    return rows, [
        at_most("devices that did not update", [devices - len(done)], 0),
        at_most("growth of the service's memory in bytes", [peak - before], GROWTH_BYTES),
    ]


def _publish(world: World, draft: Any) -> float:
    from server.release.publish import publish

    publish(draft, repository=world.repository, keys=world.keys, created=datetime.now(UTC))
    return time.monotonic()


def _one(
    world: World,
    name: str,
    kit: Path,
    port: int,
    ready: threading.Barrier,
    done: dict[str, float],
) -> None:
    """One device: waits for the second word of the service, and installs what it has then."""
    with DeliveryLink(kit, DeliveryEndpoint(HOST, port)) as link:
        calls = link.watch()
        next(calls)
        ready.wait(600)
        call = next(calls)
        time.sleep(random.uniform(0.0, call.spread_ms / 1000))  # noqa: S311
        found = updating.update(
            link.source,
            store=world.folder / "stores" / name,
            model="digits",
            root=(world.keys / "root.json").read_bytes(),
            threads=1,
        )
        assert found.version == 2
        done[name] = time.monotonic()
        calls.close()


@contextmanager
def serving(project: Delivering, repository: Path) -> Iterator[tuple[int, Callable[[], int]]]:
    """Runs ``fedcore release serve``; yields its port, and a function for its resident memory."""
    command = [sys.executable, "-m", "fedcore.cli", "release", "serve"]
    command += ["--repository", str(repository), "--identity", str(project.folder / "server")]
    command += ["--listen", f"{HOST}:0", "--log", str(project.folder / "serve.log")]
    with ExitStack() as ending:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        ending.callback(process.wait)
        ending.callback(process.terminate)
        assert process.stdout is not None
        port = int(process.stdout.readline().split("port ")[1].split(";")[0])

        def resident_bytes() -> int:
            pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1])
            return pages * os.sysconf("SC_PAGE_SIZE")

        yield port, resident_bytes


if __name__ == "__main__":
    sys.exit(main())
