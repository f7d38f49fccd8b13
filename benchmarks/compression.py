"""What compression costs and gains on the digits, over seeds, without and with a limit on bytes.

``make bench NAME=compression`` runs it; ``runs/bench/compression.json`` has the figures. Each seed
trains and fine-tunes the example once. The choice is made from the default candidates by default
limits, and then by one on bytes that fp32 exceeds, so that a quantised or pruned model is released
or none.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn

import fedcore
from benchmarks.deployment import Found, machine, table
from benchmarks.figures import at_least, at_most, row
from benchmarks.systems import ROOT
from fedcore.config.run import DEFAULT_CANDIDATES
from fedcore.errors import CompressionError
from fedcore.files import write_json
from server.compression.compressed import Compressed
from server.compression.runtime import answers, open_session

_EXAMPLE = ROOT / "examples" / "digits"
_MAX_BYTES = 100_000
"""Half of the bytes of fp32."""
_LIMITS = {"default": {}, "max_bytes": {"max_bytes": _MAX_BYTES}}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark; 1 when a check does not hold."""
    parser = argparse.ArgumentParser(prog="benchmarks.compression", description=__doc__)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    options = parser.parse_args(arguments)
    found, about = Found(), machine()
    measured: dict[str, dict[str, list[float]]] = {name: {} for name in _LIMITS}
    for seed in range(1, options.seeds + 1):
        for limits, figures in measure(seed).items():
            print(f"seed {seed}, {limits}: {figures}", flush=True)
            for metric, value in figures.items():
                measured[limits].setdefault(metric, []).append(value)
    for limits, metrics in measured.items():
        for metric, values in metrics.items():
            found.rows.append(row("fedcore", limits, metric, _UNITS[metric], values))
        worst = max(metrics["points_lost"])
        found.checks.append(at_most(f"{limits}: points lost in the worst seed", [worst], 1.0))
        found.checks.append(
            at_least(f"{limits}: torch eager over released", metrics["torch_over_released"], 3.0)
        )
    slowest = max(measured["default"]["released_over_fp32"])
    found.checks.append(at_most("default: released over fp32, worst seed", [slowest], 1.05))
    options.out.mkdir(parents=True, exist_ok=True)
    write_json(options.out / "compression.json", {"machine": about, **asdict(found)})
    print(table(found))
    return 0 if all(check.holds for check in found.checks) else 1


_UNITS = {
    "released": "yes or no",
    "points_lost": "points",
    "torch_over_released": "ratio",
    "released_over_fp32": "ratio",
    "bytes": "bytes",
    "compressed": "yes or no",
}


def measure(seed: int) -> dict[str, dict[str, float]]:
    """Trains and fine-tunes one seed, and returns the figures of each choice."""
    task = _EXAMPLE / "task.py"
    with tempfile.TemporaryDirectory(prefix="fedcore-compression-") as folder:
        path = Path(folder) / "run.toml"  # the example's, which publishes nothing
        text = (_EXAMPLE / "run.toml").read_text().partition("[release]")[0]
        path.write_text(text.replace('"task.py"', f'"{task}"'))
        run = fedcore.load_run(path, [f"seed={seed}"])
    result = fedcore.simulate(task, run, progress=False, compression={"candidates": ["fp32"]})
    before = _accuracy_of(result.model, result)
    figures = {}
    for name, limits in _LIMITS.items():
        try:
            done = fedcore.compress(
                task,
                run,
                result.model,
                progress=False,
                compression={
                    "candidates": list(DEFAULT_CANDIDATES),
                    "max_slowdown": 0.05,
                    **limits,
                },
            )
        except CompressionError as error:  # none keeps the limits: nothing would be released
            print(f"seed {seed}, {name}: {error}", flush=True)
            figures[name] = {"released": 0.0}
            continue
        figures[name] = {"released": 1.0, **_figures(done, result, before)}
    return figures


def _figures(done: Compressed, result: fedcore.Result, before: float) -> dict[str, float]:
    of = {record.name: record for record in done.records}
    released = of[done.chosen]
    session = open_session(done.files[done.chosen], threads=1)
    outputs, targets = answers(session, result.task.test_data(None))
    after = float((torch.from_numpy(outputs).argmax(1) == targets).float().mean())
    return {
        "points_lost": 100 * (before - after),
        "torch_over_released": done.torch_p50_us / released.p50_us,
        "released_over_fp32": released.p50_us / of["fp32"].p50_us,
        "bytes": float(released.bytes),
        "compressed": float(done.chosen != "fp32"),
    }


def _accuracy_of(model: nn.Module, result: fedcore.Result) -> float:
    examples = result.task.test_data(None)
    inputs = torch.stack([examples[place][0] for place in range(len(examples))])
    targets = torch.stack([examples[place][1] for place in range(len(examples))])
    with torch.inference_mode():
        return float((model(inputs).argmax(1) == targets).float().mean())


if __name__ == "__main__":
    sys.exit(main())
