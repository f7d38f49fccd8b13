"""Deployment: real servers and devices over mutual TLS, and stock Flower's beside them.

``make bench NAME=deployment`` runs it; ``runs/bench/deployment.json`` has the figures. A part that
is run alone leaves those of the others as they were.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks import deployment_flower as flower
from benchmarks.deployment_project import Memory, Program, device, load, make_project, server
from benchmarks.figures import Check, Row, at_least, at_most, row, slope
from benchmarks.measure import ProgramFailed, processor
from benchmarks.plot import plot_in_a_row
from fedcore.files import write_json

MB = 1_000_000
PARTS = ("rounds", "memory", "fleet", "soak")
OURS, STOCK = "fedcore", "flower"
ROUNDS, NODES = 3, 2
PARAMETERS = 10_000_000
_LIMIT_S = 900.0


@dataclass(frozen=True)
class Sizes:
    """How large the parts are."""

    repeats: int
    cohorts: tuple[int, ...]
    """Of updates that are sent at once."""
    fleet: int
    idle_s: float
    soak_rounds: int
    """Each is two messages a device."""
    stock: bool


FULL = Sizes(repeats=3, cohorts=(16, 64), fleet=500, idle_s=30.0, soak_rounds=500, stock=True)
QUICK = Sizes(repeats=1, cohorts=(8,), fleet=40, idle_s=5.0, soak_rounds=25, stock=False)


@dataclass
class Found:
    """What the parts have measured so far."""

    rows: list[Row] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """What Flower could not do; nothing is promised of it."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark; 1 when a check does not hold or a part failed."""
    parser = argparse.ArgumentParser(prog="benchmarks.deployment", description=__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--quick", action="store_true", help="small sizes, and without Flower")
    parser.add_argument("--repeats", type=int, help="of the part that compares rounds")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    options = parser.parse_args(arguments)
    sizes = QUICK if options.quick else FULL
    sizes = replace(sizes, repeats=options.repeats or sizes.repeats)
    scratch = (options.out / "deployment").resolve()
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    steps: dict[str, Callable[[Path, Sizes, Found], None]] = {
        "rounds": measure_rounds,
        "memory": measure_memory,
        "fleet": measure_fleet,
        "soak": measure_soak,
    }
    all_hold = True
    for part in options.parts:
        found, described = Found(), machine()
        try:
            steps[part](scratch / part, sizes, found)
        except ProgramFailed as error:
            found.failures.append(f"{part}: {error}")
        write_part(
            options.out, part, {"machine": described, "sizes": asdict(sizes), **asdict(found)}
        )
        print(table(found), flush=True)
        all_hold = all_hold and not found.failures and all(one.holds for one in found.checks)
    return 0 if all_hold else 1


def write_part(out: Path, part: str, result: dict[str, Any]) -> None:
    """Puts what a part found beside what others did, and draws all of it."""
    path = out / "deployment.json"
    parts = json.loads(path.read_text())["parts"] if path.exists() else {}
    parts[part] = {"ended": datetime.now(UTC).isoformat(timespec="seconds"), **result}
    parts = {name: parts[name] for name in PARTS if name in parts}
    write_json(path, {"parts": parts})
    rows = [row for each in parts.values() for row in each["rows"]]
    plot_in_a_row(rows, out / "deployment.png", panels=PANELS)


PANELS = (
    ("seconds_per_round", "seconds a round", 1.0, "log"),
    ("risen_bytes", "memory above idle, MB", 1e6, "linear"),
)
"""Of the picture."""


def measure_rounds(root: Path, sizes: Sizes, found: Found) -> None:
    """Training and evaluation of a small net on two nodes: what a round costs beside them."""
    ours, theirs = [], []
    for repeat in range(sizes.repeats):
        ours.append(_rounds(root / f"fedcore-{repeat}"))
        if sizes.stock:
            stock = root / f"flower-{repeat}"
            theirs.append(flower.seconds_per_round(stock, rounds=ROUNDS, nodes=NODES))
    found.rows.append(row(OURS, "two nodes", "seconds_per_round", "s", ours))
    found.checks.append(at_most("a round of two nodes, s", ours, 0.5))
    if theirs:
        found.rows.append(row(STOCK, "two nodes", "seconds_per_round", "s", theirs))
        times = [slow / fast for slow, fast in zip(theirs, ours, strict=True)]
        found.checks.append(at_least("Flower's round over ours", times, 40.0))


def _rounds(root: Path) -> float:
    project = make_project(root, NODES)
    settings = {"rounds": 1 + ROUNDS, "cohort": NODES, "evaluate_cohort": NODES, "holdout": 0.2}
    with ExitStack() as stack:
        ours = stack.enter_context(server(project, "trial", **settings))
        ours.wait_for("listening on")
        for name in project.names:
            stack.enter_context(device(project, name))
        _wait_for_rounds(ours, 1 + ROUNDS)
        warm = ours.events("round_finished")[1:]  # in the first, devices still import torch
        return statistics.fmean(event["seconds"] for event in warm)


def measure_memory(root: Path, sizes: Sizes, found: Found) -> None:
    """Updates of ten million parameters, all sent at once: how far the server's memory rises.

    From its size with the model loaded, all devices but one there, and no round on.
    """
    for cohort in sizes.cohorts:
        ours, workload = _memory(root / f"fedcore-{cohort}", cohort), f"{cohort} updates"
        _note_memory(found, OURS, workload, ours)
        risen = [ours.risen_bytes / MB]
        found.checks.append(at_most(f"memory above idle with {workload}, MB", risen, 200.0))
        if not sizes.stock:
            continue
        stock = root / f"flower-{cohort}"
        try:
            theirs = flower.memory(stock, cohort=cohort, parameters=PARAMETERS)
        except ProgramFailed as error:
            found.notes.append(f"{workload}: {error}")
        else:
            _note_memory(found, STOCK, workload, theirs)


def _memory(root: Path, cohort: int) -> Memory:
    project = make_project(root, cohort, parameters=PARAMETERS)
    settings = {"rounds": 1, "cohort": cohort, "deadline_s": _LIMIT_S}
    with ExitStack() as stack:
        ours = stack.enter_context(server(project, "trial", **settings))
        ours.wait_for("listening on")
        most = stack.enter_context(load(project, "most", count=cohort - 1, parameters=PARAMETERS))
        _wait_for_devices(most, "there", cohort - 1)
        time.sleep(5.0)
        before_bytes = peak_bytes = ours.pss_bytes()
        stack.enter_context(load(project, "last", first=cohort - 1, count=1, parameters=PARAMETERS))
        end = time.monotonic() + _LIMIT_S
        while ours.process.poll() is None:  # to its end: the model is written after the round
            peak_bytes = max(peak_bytes, ours.pss_bytes())
            _go_on(ours, end)
            time.sleep(0.01)
        _wait_for_rounds(ours, 1)
        (event,) = ours.events("round_finished")
    if event["updates"] != cohort:
        raise ProgramFailed(f"{event['updates']} of {cohort} updates were taken: {event}")
    return Memory(before_bytes, peak_bytes, event["seconds"])


def _note_memory(found: Found, system: str, workload: str, memory: Memory) -> None:
    for metric, unit, value in (
        ("idle_bytes", "bytes", memory.before_bytes),
        ("risen_bytes", "bytes", memory.risen_bytes),
        ("seconds", "s", memory.seconds),
    ):
        found.rows.append(row(system, workload, metric, unit, [value]))


def measure_fleet(root: Path, sizes: Sizes, found: Found) -> None:
    """Many devices that wait: what they cost, how soon all are woken, when all have answered."""
    count, workload = sizes.fleet, f"{sizes.fleet} devices"
    project = make_project(root, count)
    settings = {"rounds": 1, "cohort": count, "deadline_s": _LIMIT_S}
    with ExitStack() as stack:
        ours = stack.enter_context(server(project, "trial", **settings))
        ours.wait_for("listening on")
        most = stack.enter_context(load(project, "most", count=count - 1))
        came_s = _wait_for_devices(most, "there", count - 1) - _wait_for_devices(most, "there", 1)
        time.sleep(5.0)
        began, spent_s = time.monotonic(), ours.cpu_s()
        time.sleep(sizes.idle_s)
        share = (ours.cpu_s() - spent_s) / (time.monotonic() - began)
        last = stack.enter_context(load(project, "last", first=count - 1, count=1))
        _wait_for_rounds(ours, 1)
        (event,) = ours.events("round_finished")
        began_s = _wait_for_devices(last, "there", 1)
        woken = [_devices(most, "woken", count - 1), _devices(last, "woken", 1)]
    times = [at_s for at_s in woken if at_s is not None]
    if event["updates"] != count or len(times) < len(woken):
        raise ProgramFailed(f"{event['updates']} of {count} devices completed the round: {event}")
    woken_s = max(times) - began_s
    for metric, unit, value in (
        ("idle_cpu", "cores", share),
        ("woken_s", "s", woken_s),
        ("seconds_per_round", "s", float(event["seconds"])),
        ("came_s", "s", came_s),
    ):
        found.rows.append(row(OURS, workload, metric, unit, [value]))
    found.checks.append(at_most(f"CPU of the server with {workload} idle, cores", [share], 0.15))
    found.checks.append(at_most(f"all of {workload} woken, s", [woken_s], 2.0))


def measure_soak(root: Path, sizes: Sizes, found: Found) -> None:
    """Many messages to each device: processes that are left behind, and memory that grows."""
    rounds, messages = sizes.soak_rounds, 2 * sizes.soak_rounds
    project = make_project(root, NODES)
    settings = {"rounds": rounds, "cohort": NODES, "evaluate_cohort": NODES, "holdout": 0.2}
    samples: dict[str, list[tuple[float, int]]] = {name: [] for name in project.names}
    zombies = 0
    with ExitStack() as stack:
        ours = stack.enter_context(server(project, "trial", **settings))
        ours.wait_for("listening on")
        devices = {name: stack.enter_context(device(project, name)) for name in project.names}
        end, done = time.monotonic() + _LIMIT_S, 0
        while done < rounds:
            _go_on(ours, end)
            time.sleep(0.1)
            done = len(ours.events("round_finished"))
            if done < rounds // 5:  # what the first messages allocate is no growth
                continue
            for name, one in devices.items():
                samples[name].append((2.0 * done, one.anonymous_bytes()))
                zombies = max(zombies, sum(map(_is_zombie, one.family())))
    grown = [slope(*zip(*sizes_of, strict=True)) * 1000 for sizes_of in samples.values()]
    workload = f"{messages} messages"
    peaks = [max(size for _, size in sizes_of) for sizes_of in samples.values()]
    found.rows.append(row(OURS, workload, "device_bytes", "bytes", peaks))
    found.rows.append(row(OURS, workload, "growth_per_1000", "bytes", grown))
    found.rows.append(row(OURS, workload, "zombies", "processes", [zombies]))
    if messages >= 1000:
        found.checks.append(
            at_most("growth of a device over 1,000 messages, MB", [one / MB for one in grown], 4.0)
        )
    found.checks.append(at_most("zombies of a device", [zombies], 0))


def _is_zombie(process: int) -> bool:
    try:
        stat = Path(f"/proc/{process}/stat").read_text()
    except OSError:  # it has ended, and was waited for
        return False
    return stat.rpartition(")")[2].split()[0] == "Z"


def _wait_for_rounds(ours: Program, rounds: int) -> None:
    end = time.monotonic() + _LIMIT_S
    while len(ours.events("round_finished")) < rounds:
        _go_on(ours, end)
        time.sleep(0.05)


def _go_on(ours: Program, end: float) -> None:
    if ours.process.poll() not in (None, 0) or time.monotonic() > end:
        raise ProgramFailed(f"the server did not finish: {ours.last_words()}")


def _wait_for_devices(process: Program, what: str, count: int) -> float:
    """Waits until ``count`` have come so far; returns when, on the monotonic clock."""
    end = time.monotonic() + _LIMIT_S
    while (at_s := _devices(process, what, count)) is None:
        if process.process.poll() is not None or time.monotonic() > end:
            raise ProgramFailed(f"not all devices were {what}: {process.last_words()}")
        time.sleep(0.1)
    return at_s


def _devices(process: Program, what: str, count: int) -> float | None:
    """When the device that makes it ``count`` was so far."""
    return next(
        (float(one["at_s"]) for one in process.events(what) if one["devices"] == count), None
    )


def machine() -> dict[str, Any]:
    """What runs on, and how busy it is."""
    return {
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "load": os.getloadavg()[0],
        "versions": {
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in ("fedcore", "torch", "flwr", "grpcio")},
        },
    }


def table(found: Found) -> str:
    """Rows and checks as text."""
    lines = [
        f"{'workload':15} {'system':8} {'metric':18} {'median':>12} {'min':>12} {'max':>12}  n"
    ]
    for each in found.rows:
        lines.append(
            f"{each.workload:15} {each.system:8} {each.metric:18} {each.median:12.5g} "
            f"{each.min:12.5g} {each.max:12.5g}  {each.repeats}  {each.unit}"
        )
    for check in found.checks:
        lines.append(
            f"{'holds ' if check.holds else 'BROKEN'} {check.name}: {check.value:.4g} "
            f"({check.min:.4g} to {check.max:.4g}), bound {check.bound:.4g}"
        )
    lines += [f"FAILED {failure}" for failure in found.failures]
    lines += [f"NOTE   {note}" for note in found.notes]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
