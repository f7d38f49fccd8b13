"""What the loop does where the cloud does not look like the devices, and where it does.

``python -m benchmarks.shifted`` runs six small tasks over seeds, each in this process: MNIST by
writer with a cloud of other inputs, of other label shares, of one writer, and of thirty writers;
scikit-learn's digits; and jet engines of which thirty are the cloud's. Clients hold a quarter of
their data back and judge; of the engines, the cloud does. Models are compared by accuracy (engines:
RMSE, in units of 125 cycles) on clients whom nothing in the run has read, not even its final test.
Beside the loop's defaults (``guarded``) the same rounds end by the cloud's judgement alone and
without distillation (``cloud``): what the guards are for. ``runs/bench/shifted.json`` has the
figures.

A model counts as published unless the final test withholds it; the federated model then stands.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import fedcore
from benchmarks.figures import Check, Row, at_least, row
from benchmarks.measure import processor
from benchmarks.shifted_tasks import CLIENTS, WORKLOADS, Drawn, Workload
from fedcore.errors import DataError
from fedcore.files import write_json
from fedcore.training.evaluate import evaluate
from server.final_scores import answers_of_chosen

SEEDS = tuple(range(10))
MAX_DROP = 0.01
GUARDED, CLOUD = "guarded", "cloud"
VARIANTS: dict[str, dict[str, Any]] = {GUARDED: {}, CLOUD: {"judge": "cloud", "remember": 0.0}}
"""``[finetune]`` of each, over the settings of a task."""
METRICS = {workload.name: workload.metric for workload in WORKLOADS}
FIGURES = ("federated", "finetuned", "chosen", "published", "gain")


@dataclass(frozen=True, kw_only=True)
class Ended:
    """One run: the metric on clients that it has never read."""

    workload: str
    variant: str
    seed: int
    federated: float
    finetuned: float
    """Of the model that the gate let through; the federated one if it was turned down."""
    chosen: float
    """Of the candidate's ONNX file."""
    published: float
    """Of what devices would have: ``chosen``, or ``federated`` where the final test withheld it."""
    candidate: str
    kept: bool
    """Whether the gate let the fine-tuned model through."""
    withheld: bool
    seconds: float

    @property
    def gain(self) -> float:
        """How much better devices are off than with the federated model.

        Of accuracies the difference; of an error the part of it that is gone.
        """
        return -METRICS[self.workload].worsening(self.federated, self.published)


def run_once(workload: Workload, variant: str, *, seed: int, folder: Path | None) -> Ended:
    """Runs one task to its end.

    Args:
        workload: The task.
        variant: One of `VARIANTS`.
        seed: Of the draw of clients and of the run.
        folder: Holds MNIST by writer and C-MAPSS; None for tasks that need no data.
    """
    started = time.monotonic()
    drawn = workload.make(folder, seed)
    metric, given = workload.metric, workload.settings
    federation = dict(given["federation"])
    if "holdout" in federation:
        federation["evaluate_cohort"] = min(CLIENTS, len(drawn.task.clients(folder)))
    finetune = {**given.get("finetune", {}), **VARIANTS[variant]}
    settings: dict[str, Any] = {**given, "federation": federation, "finetune": finetune}
    result = fedcore.simulate(drawn.task, workload.run, progress=False, seed=seed, **settings)
    federated = _score(drawn, result.federated, metric)
    answer = answers_of_chosen(result.compressed, threads=1)
    chosen = metric.compute(*answer(drawn.unseen))
    tested = result.record.tested
    assert tested is not None
    assert tested.drop is not None
    withheld = tested.drop > result.run.release.max_test_drop
    return Ended(
        workload=workload.name,
        variant=variant,
        seed=seed,
        federated=federated,
        finetuned=_score(drawn, result.model, metric),
        chosen=chosen,
        published=federated if withheld else chosen,
        candidate=result.compressed.chosen,
        kept=result.compressed.source_sha256 != result.origin.parent_sha256,
        withheld=withheld,
        seconds=time.monotonic() - started,
    )


def _score(drawn: Drawn, model: torch.nn.Module, metric: fedcore.Metric) -> float:
    return evaluate(model, drawn.unseen, [metric])[metric.name]


def rows_of(runs: Sequence[Ended]) -> list[Row]:
    """Every figure of every variant and workload over seeds."""
    rows = []
    for workload, variant in dict.fromkeys((run.workload, run.variant) for run in runs):
        mine = [run for run in runs if (run.workload, run.variant) == (workload, variant)]
        for figure in FIGURES:
            values = [getattr(run, figure) for run in mine]
            rows.append(row(variant, workload, figure, "fraction", values))
        for count in ("kept", "withheld"):
            values = [float(getattr(run, count)) for run in mine]
            rows.append(row(variant, workload, count, "of 1", [statistics.fmean(values)]))
    return rows


def checks_of(runs: Sequence[Ended]) -> list[Check]:
    """What is promised: no seed loses a point to a cloud unlike the devices; one like them helps.

    Where the cloud helps, the mean alone is promised: the digits' 400 unseen rows tell a point from
    none in no single seed. The worst seed stands among the rows, as ``min`` of ``gain``.
    """
    ours = [run for run in runs if run.variant == GUARDED]
    found = []
    for workload in WORKLOADS:
        gains = [run.gain for run in ours if run.workload == workload.name]
        if not gains:
            continue
        worst, mean = round(min(gains), 9), statistics.fmean(gains)  # 0.79 - 0.8 is below -0.01
        if workload.helps:
            found.append(at_least(f"{workload.name}: mean gain", [mean], 0.0))
        else:
            found.append(at_least(f"{workload.name}: worst gain of a seed", [worst], -MAX_DROP))
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark; 1 when a check does not hold."""
    parser = argparse.ArgumentParser(prog="benchmarks.shifted", description=__doc__)
    names = [workload.name for workload in WORKLOADS]
    parser.add_argument("--workloads", nargs="+", choices=names, default=names)
    parser.add_argument("--variants", nargs="+", choices=[*VARIANTS], default=[*VARIANTS])
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    options = parser.parse_args(arguments)
    folder = os.environ.get("FEDCORE_DATA")
    if not folder and options.workloads != ["digits"]:
        error = DataError(
            "FEDCORE_DATA is not set, and the benchmark needs MNIST and C-MAPSS: set it to the "
            "folder that holds mnist_by_writer and cmapss_fd001. Nothing was run."
        )
        print(error, file=sys.stderr)
        return error.exit_code
    torch.set_num_threads(1)
    runs = []
    for seed in options.seeds:
        for workload in (each for each in WORKLOADS if each.name in options.workloads):
            for variant in options.variants:
                where = Path(folder) if folder else None
                runs.append(run_once(workload, variant, seed=seed, folder=where))
                print(json.dumps(asdict(runs[-1])), file=sys.stderr, flush=True)
    checks = checks_of(runs)
    result = {
        "machine": _machine(),
        "rows": [asdict(each) for each in rows_of(runs)],
        "checks": [asdict(each) for each in checks],
        "runs": [asdict(run) | {"gain": run.gain} for run in runs],
    }
    options.out.mkdir(parents=True, exist_ok=True)
    write_json(options.out / "shifted.json", result)
    print(table(result))
    return 0 if checks and all(check.holds for check in checks) else 1


def _machine() -> dict[str, Any]:
    return {
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)),
        "load": os.getloadavg()[0],
        "versions": {name: metadata.version(name) for name in ("fedcore", "torch", "onnxruntime")},
    }


def table(result: Mapping[str, Any]) -> str:
    """Rows and checks as text; the limit is what no cloud data could take: a gain of zero."""
    lines = [f"{'workload':9} {'system':8} {'figure':10} {'median':>8} {'min':>8} {'max':>8}  n"]
    for each in (Row(**fields) for fields in result["rows"]):
        lines.append(
            f"{each.workload:9} {each.system:8} {each.metric:10} {each.median:8.4f} "
            f"{each.min:8.4f} {each.max:8.4f}  {each.repeats}"
        )
    for check in (Check(**fields) for fields in result["checks"]):
        lines.append(
            f"{'holds ' if check.holds else 'BROKEN'} {check.name}: {check.value:+.4f}, bound "
            f"{check.bound:+.4f}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
