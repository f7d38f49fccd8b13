"""Accuracy under example-level privacy: MNIST over 10 clients of 6,000 images, at epsilon 3.

``python -m benchmarks.mnist_private`` runs ``examples/mnist_private`` over seeds by the command
line, beside logistic regression on pixels at the same epsilon, and the example's own model without
privacy: the limit that noise keeps it from. ``runs/bench/mnist_private.json`` has the figures.
Accuracy is the global model's on the 10,000 test images after the last round; epsilon is what the
clients' ledgers come to, at most. The settings of both were chosen on 6,000 training images held
back, never on test images; what that choice tells of the data is not counted in epsilon.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks.figures import Check, Row, at_least, at_most, row
from benchmarks.measure import ProgramFailed, observe, processor
from benchmarks.systems import ROOT
from fedcore.errors import DataError
from fedcore.files import write_json

WORKLOAD = "mnist_private"
EXAMPLE = ROOT / "examples" / WORKLOAD / "run.toml"
SEEDS = (1, 2, 3)
LEAST_ACCURACY, AIM, MAX_ROUNDS, EPSILON, DELTA = 0.94, 0.965, 30, 3.0, 1e-5
_LIMIT_S = 7200.0


@dataclass(frozen=True)
class Variant:
    """One way to train on the example's clients."""

    name: str
    settings: tuple[str, ...] = ()
    """Over the example's run file."""


FEATURES = Variant("features")
PIXELS = Variant(
    "pixels",
    (
        f"task={ROOT / 'benchmarks' / 'tasks' / 'mnist_pixels.py'}",
        "client.learning_rate=4.0",
        "privacy.clip_norm=3.0",
    ),
)
WITHOUT_PRIVACY = Variant(
    "features-no-privacy",
    (
        "privacy.unit=none",
        "client.batch_size=60",
        "client.optimizer=adam",
        "client.learning_rate=0.001",
    ),
)
VARIANTS = (FEATURES, PIXELS, WITHOUT_PRIVACY)
METRICS = {"accuracy": "fraction", "epsilon": "epsilon", "rounds": "rounds", "seconds": "s"}


@dataclass(frozen=True, kw_only=True)
class Trained:
    """One run, by its own summary."""

    variant: str
    seed: int
    accuracy: float
    epsilon: float | None
    target_delta: float | None
    rounds: int
    seconds: float
    """From the first round to the last, and the test of the model behind it."""


def train(variant: Variant, *, seed: int, rounds: int | None, scratch: Path) -> Trained:
    """Runs a variant in a process of its own.

    Args:
        variant: What to run.
        seed: Of the run: weights, sampling, noise.
        rounds: Fewer or more than the run file's; None for those.
        scratch: The run's folder is made below it.

    Raises:
        ProgramFailed: it failed; what it said is quoted.
    """
    runs = (scratch / f"{variant.name}-{seed}").resolve()
    settings = [*variant.settings, f"seed={seed}"]
    settings += [f"federation.rounds={rounds}"] if rounds else []
    command = [
        *(
            sys.executable,
            "-m",
            "fedcore.cli",
            "simulate",
            str(EXAMPLE),
            "--runs",
            str(runs),
            "--fresh",
        ),
        *(word for setting in settings for word in ("--set", setting)),
    ]
    runs.mkdir(parents=True, exist_ok=True)
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    observe(command, environment=environment, folder=runs, limit_s=_LIMIT_S)
    summary = json.loads((runs / "mnist-private" / "summary.json").read_text())
    return trained_of(variant, seed, summary)


def trained_of(variant: Variant, seed: int, summary: Mapping[str, Any]) -> Trained:
    """The figures of a run's summary."""
    return Trained(
        variant=variant.name,
        seed=seed,
        accuracy=summary["accuracy"]["federated"],
        epsilon=summary["epsilon"]["max"],
        target_delta=summary["target_delta"],
        rounds=summary["rounds"],
        seconds=summary["seconds"]["federate"],
    )


def rows_of(runs: Sequence[Trained]) -> list[Row]:
    """Every metric of every variant over seeds."""
    rows = []
    for name in dict.fromkeys(run.variant for run in runs):
        for metric, unit in METRICS.items():
            values = [getattr(run, metric) for run in runs if run.variant == name]
            known = [value for value in values if value is not None]
            if known:
                rows.append(row(name, WORKLOAD, metric, unit, known))
    return rows


def checks_of(runs: Sequence[Trained]) -> list[Check]:
    """What is promised of the example: every seed keeps the budget, the median is accurate."""
    ours = [run for run in runs if run.variant == FEATURES.name]
    if not ours:
        return []
    # No ledger, or another delta, is no epsilon at all: JSON knows no infinity.
    spent = [
        run.epsilon if run.epsilon is not None and run.target_delta == DELTA else 1e9
        for run in ours
    ]
    accuracy = [run.accuracy for run in ours]
    return [
        at_least("accuracy at epsilon 3", accuracy, LEAST_ACCURACY),
        at_least("accuracy at epsilon 3, aimed for", accuracy, AIM),
        at_most("epsilon at delta 1e-5, worst seed", [max(spent)], EPSILON),
        at_most("rounds", [run.rounds for run in ours], MAX_ROUNDS),
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark; 1 when a check does not hold or a run failed."""
    parser = argparse.ArgumentParser(prog="benchmarks.mnist_private", description=__doc__)
    names = [variant.name for variant in VARIANTS]
    parser.add_argument("--variants", nargs="+", choices=names, default=names)
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    parser.add_argument("--rounds", type=int, help="those of the example's run file when unset")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    options = parser.parse_args(arguments)
    if not os.environ.get("FEDCORE_DATA"):
        error = DataError(
            "FEDCORE_DATA is not set, and the benchmark needs MNIST: set it to the folder that "
            "holds mnist_by_writer. Nothing was run."
        )
        print(error, file=sys.stderr)
        return error.exit_code
    runs, failures = [], []
    for seed in options.seeds:
        for variant in (each for each in VARIANTS if each.name in options.variants):
            try:
                scratch = options.out / WORKLOAD
                runs.append(train(variant, seed=seed, rounds=options.rounds, scratch=scratch))
                print(runs[-1], file=sys.stderr, flush=True)
            except ProgramFailed as error:
                print(f"FAILED: {error}", file=sys.stderr, flush=True)
                failures.append(str(error))
    checks = checks_of(runs)
    result = {
        "machine": _machine(),
        "rows": [asdict(each) for each in rows_of(runs)],
        "checks": [asdict(each) for each in checks],
        "failures": failures,
        "runs": [asdict(run) for run in runs],
    }
    options.out.mkdir(parents=True, exist_ok=True)
    write_json(options.out / "mnist_private.json", result)
    print(table(result))
    return 0 if checks and all(check.holds for check in checks) and not failures else 1


def _machine() -> dict[str, Any]:
    return {
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)),
        "load": os.getloadavg()[0],
        "versions": {name: metadata.version(name) for name in ("fedcore", "torch", "opacus")},
    }


def table(result: Mapping[str, Any]) -> str:
    """Rows and checks as text."""
    lines = [f"{'system':20} {'metric':9} {'median':>10} {'min':>10} {'max':>10}  n"]
    for each in (Row(**fields) for fields in result["rows"]):
        lines.append(
            f"{each.system:20} {each.metric:9} {each.median:10.4g} {each.min:10.4g} "
            f"{each.max:10.4g}  {each.repeats}  {each.unit}"
        )
    for check in (Check(**fields) for fields in result["checks"]):
        lines.append(
            f"{'holds ' if check.holds else 'BROKEN'} {check.name}: {check.value:.4g} "
            f"({check.min:.4g} to {check.max:.4g}), bound {check.bound:.4g}"
        )
    return "\n".join([*lines, *(f"FAILED {failure}" for failure in result["failures"])])


if __name__ == "__main__":
    sys.exit(main())
