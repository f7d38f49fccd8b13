"""Benchmarks of what models learn: a few systems on a workload, compared seed by seed.

A benchmark names its `Comparison` objects and calls `main`, which runs them over seeds, writes
``runs/bench/NAME.json`` and prints rows and checks.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from benchmarks.figures import Check, Row, at_least, at_most, row
from benchmarks.measure import processor
from fedcore.errors import DataError
from fedcore.files import write_json

Figures = Mapping[str, float]
"""One seed's figures, by system."""


@dataclass(frozen=True, kw_only=True)
class Bound:
    """A figure that is promised of the median over seeds."""

    name: str
    value: Callable[[Figures], float]
    """Computes it from one seed's figures."""
    least: float | None = None
    most: float | None = None

    def check(self, workload: str, seeds: Sequence[Figures]) -> Check:
        """Checks it over seeds."""
        values, name = [self.value(each) for each in seeds], f"{workload}: {self.name}"
        if self.least is not None:
            return at_least(name, values, self.least)
        assert self.most is not None
        return at_most(name, values, self.most)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Systems on one workload."""

    workload: str
    metric: str
    unit: str
    run: Callable[[Path | None, int], Figures]
    """Runs every system with a seed; the folder is what FEDCORE_DATA names."""
    bounds: tuple[Bound, ...]
    needs_data: bool = False


def main(
    name: str,
    comparisons: Sequence[Comparison],
    *,
    description: str | None,
    seeds: Sequence[int],
    arguments: Sequence[str] | None = None,
) -> int:
    """Runs a benchmark; 1 when a check does not hold."""
    parser = argparse.ArgumentParser(prog=f"benchmarks.{name}", description=description)
    names = [each.workload for each in comparisons]
    parser.add_argument("--workloads", nargs="+", choices=names, default=names)
    parser.add_argument("--seeds", nargs="+", type=int, default=list(seeds))
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    options = parser.parse_args(arguments)
    wanted = [each for each in comparisons if each.workload in options.workloads]
    folder = os.environ.get("FEDCORE_DATA")
    if not folder and any(each.needs_data for each in wanted):
        error = DataError(
            "FEDCORE_DATA is not set, and the benchmark needs data sets: set it to the folder "
            "that holds them. Nothing was run."
        )
        print(error, file=sys.stderr)
        return error.exit_code
    torch.set_num_threads(1)
    runs: list[dict[str, Any]] = []
    rows: list[Row] = []
    checks: list[Check] = []
    for each in wanted:
        found = []
        for seed in options.seeds:
            started = time.process_time()
            found.append(each.run(Path(folder) if folder else None, seed))
            runs.append({"workload": each.workload, "seed": seed, **found[-1]})
            runs[-1]["cpu_s"] = time.process_time() - started
            print(json.dumps(runs[-1]), file=sys.stderr, flush=True)
        for system in found[0]:
            values = [one[system] for one in found]
            rows.append(row(system, each.workload, each.metric, each.unit, values))
        checks += [bound.check(each.workload, found) for bound in each.bounds]
    result = {
        "machine": {
            "processor": processor(),
            "cores": len(os.sched_getaffinity(0)),
            "load": os.getloadavg()[0],
            "versions": {one: metadata.version(one) for one in ("fedcore", "torch")},
        },
        "rows": [asdict(each) for each in rows],
        "checks": [asdict(each) for each in checks],
        "runs": runs,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    write_json(options.out / f"{name}.json", result)
    print(table(rows, checks))
    return 0 if checks and all(check.holds for check in checks) else 1


def table(rows: Sequence[Row], checks: Sequence[Check]) -> str:
    """Rows and checks as text."""
    lines = [f"{'workload':16} {'system':24} {'median':>9} {'min':>9} {'max':>9}  n  metric"]
    for each in rows:
        lines.append(
            f"{each.workload:16} {each.system:24} {each.median:9.4f} {each.min:9.4f} "
            f"{each.max:9.4f} {each.repeats:2}  {each.metric} ({each.unit})"
        )
    for check in checks:
        lines.append(
            f"{'holds ' if check.holds else 'BROKEN'} {check.name}: {check.value:.4g} (from "
            f"{check.min:.4g} to {check.max:.4g}), bound {check.bound:.4g}"
        )
    return "\n".join(lines)
