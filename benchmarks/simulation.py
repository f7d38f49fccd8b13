"""Simulation: fedcore beside Flower, pfl, FedJAX, Opacus and a bare loop, on one machine.

``make bench NAME=simulation`` makes the peers' environment and runs this. Every system runs in a
process of its own, in turn, on the same clients; ``runs/bench/simulation.json`` has the figures.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks.campaign import (
    MILLION,
    PLANS,
    Outcome,
    checks_of,
    compare_peers,
    run_million,
    run_plan,
)
from benchmarks.figures import Check, Row, Run, row, rows_of
from benchmarks.gpu import has_gpu, run_gpu
from benchmarks.measure import observe, processor
from benchmarks.partitions import prepare
from benchmarks.plot import plot
from benchmarks.systems import BARE, FEDCORE, ROOT, Place
from fedcore.errors import DataError
from fedcore.files import write_json

_VERSIONS = ("torch", "flwr", "ray", "pfl", "fedjax", "jax", "opacus", "numpy")
_ROOFS = ("w2", "w1")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark; 1 when a check does not hold or a system failed."""
    options = _parser().parse_args(arguments)
    place = Place(options.peers_python, options.out / "data", options.out / "simulation")
    place.scratch.mkdir(parents=True, exist_ok=True)
    plans = [plan for plan in PLANS if plan.workload in options.workloads]
    try:
        _prepare(options.workloads, place.data)
    except DataError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    outcomes = []
    for plan in plans:
        chosen = tuple(each for each in plan.systems if each.name in options.systems)
        if options.quick:
            chosen = tuple(each for each in chosen if each in (FEDCORE, BARE))
        repeats = 1 if options.quick else options.repeats or plan.repeats
        outcomes.append(
            run_plan(
                replace(plan, systems=chosen), place, repeats=repeats, longer=not options.quick
            )
        )
    if MILLION in options.workloads and FEDCORE.name in options.systems:
        outcomes.append(run_million(place))
    if has_gpu() and FEDCORE.name in options.systems and not options.quick:
        outcomes.append(run_gpu(place, options.workloads))
    result = _result(outcomes, place, [plan.workload for plan in plans], quick=options.quick)
    write_json(options.out / "simulation.json", result)
    print(table(result))
    if result["rows"]:
        plot(result["rows"], options.out / "simulation.png")
    broken = [check for check in result["checks"] if not check["holds"]]
    return 1 if broken or result["failures"] else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="benchmarks.simulation", description=__doc__)
    names = [plan.workload for plan in PLANS] + [MILLION]
    systems = sorted({system.name for plan in PLANS for system in plan.systems})
    parser.add_argument("--workloads", nargs="+", choices=names, default=names)
    parser.add_argument("--systems", nargs="+", choices=systems, default=systems)
    parser.add_argument("--repeats", type=int, help="of each workload; its own number when unset")
    parser.add_argument(
        "--quick", action="store_true", help="one repeat of fedcore and the bare loop, no checks"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    parser.add_argument(
        "--peers-python",
        type=Path,
        default=ROOT / ".venv-bench" / "bin" / "python",
        help="the interpreter of the peers' environment",
    )
    return parser


def _prepare(workloads: Sequence[str], out: Path) -> None:
    folder = os.environ.get("FEDCORE_DATA")
    for name in dict.fromkeys(_partition(workload) for workload in workloads):
        if folder is None and not (out / f"{name}.safetensors").exists():
            raise DataError(
                "FEDCORE_DATA is not set, and the benchmark needs MNIST by writer: set it to the "
                "folder that holds mnist_by_writer. Nothing was run."
            )
        prepare(Path(folder or "") / "mnist_by_writer", name, out)


def _partition(workload: str) -> str:
    """The data file that a workload reads; a million clients draw from that of W2."""
    return "w2" if workload == MILLION else workload.removesuffix("_dp")


def _result(
    outcomes: Sequence[Outcome], place: Place, workloads: Sequence[str], *, quick: bool
) -> dict[str, Any]:
    runs = [run for outcome in outcomes for run in outcome.runs]
    roofline = _roofline([name for name in _ROOFS if name in workloads])
    rows = rows_of(runs) + [each for outcome in outcomes for each in outcome.extra_rows]
    checks = checks_of(runs) + [each for outcome in outcomes for each in outcome.extra_checks]
    return {
        "machine": _machine(place),
        "rows": [asdict(each) for each in rows + _floor_rows(roofline, runs)],
        "checks": [] if quick else [asdict(each) for each in checks],
        "roofline": roofline,
        "peers": compare_peers(runs),
        "chosen": [
            {"system": system, "workload": workload, "said": said}
            for outcome in outcomes
            for system, workload, said in outcome.chosen
            if said
        ],
        "failures": [failure for outcome in outcomes for failure in outcome.failures],
        "runs": [asdict(run) for run in runs],
    }


def _roofline(workloads: Sequence[str]) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.roofline", *workloads]
    observed = observe(command, environment={}, folder=ROOT, limit_s=120)
    found: dict[str, Any] = json.loads(observed.lines[-1][1])
    return found


def _floor_rows(roofline: dict[str, Any], runs: Sequence[Run]) -> list[Row]:
    """The limit of each workload, and how many times that fedcore takes."""
    rows = []
    for workload, found in roofline["workloads"].items():
        rows.append(row("roofline", workload, "seconds_per_round", "s", [found["floor_s"]]))
        ours = [
            run.seconds_per_round / found["floor_s"]
            for run in runs
            if (run.workload, run.system) == (workload, FEDCORE.name)
        ]
        if ours:
            rows.append(row(FEDCORE.name, workload, "times_the_floor", "ratio", ours))
    return rows


def _machine(place: Place) -> dict[str, Any]:
    return {
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "load": os.getloadavg()[0],
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
        "versions": {
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in ("fedcore", "torch", "flwr")},
        },
        "peers": _peer_versions(place),
    }


def _peer_versions(place: Place) -> dict[str, str]:
    """What the peers' environment holds, asked of its own interpreter."""
    ask = (
        "import json; from importlib.metadata import distributions as d; "
        f"print(json.dumps({{x.name: x.version for x in d() if x.name in {_VERSIONS}}}))"
    )
    if not place.peers_python.exists():
        return {}
    command = [str(place.peers_python), "-c", ask]
    observed = observe(command, environment={}, folder=ROOT, limit_s=60)
    versions: dict[str, str] = json.loads(observed.lines[-1][1])
    return versions


def table(result: dict[str, Any]) -> str:
    """The result as text: rows, checks, peers' ratios beside the reference's."""
    lines = [
        f"{'workload':9} {'system':10} {'metric':22} {'median':>12} {'min':>12} {'max':>12}  n"
    ]
    for each in (Row(**fields) for fields in result["rows"]):
        lines.append(
            f"{each.workload:9} {each.system:10} {each.metric:22} {each.median:12.5g} "
            f"{each.min:12.5g} {each.max:12.5g}  {each.repeats}  {each.unit}"
        )
    for check in (Check(**fields) for fields in result["checks"]):
        lines.append(
            f"{'holds ' if check.holds else 'BROKEN'} {check.name}: {check.value:.4g} "
            f"({check.min:.4g} to {check.max:.4g}), bound {check.bound:.4g}"
        )
    for peer in result["peers"]:
        lines.append(
            f"{peer['workload']}: {peer['ratio']} {peer['measured']:.3g}, reference "
            f"{peer['reference']:.3g} ({peer['deviation']:+.0%}) {peer['reason']}"
        )
    lines += [f"FAILED {failure}" for failure in result["failures"]]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
