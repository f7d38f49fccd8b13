"""Inference on a device: how close to bare onnxruntime an installed model answers, also served.

``make bench NAME=inference`` runs it; ``runs/bench/inference.json`` has the figures of each part. A
part that runs alone keeps the figures of the others.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks import inference_generate, inference_network, inference_process
from benchmarks.deployment import Found, machine, table
from benchmarks.measure import ProgramFailed
from fedcore.files import write_json

PARTS: dict[str, Callable[[Path, bool, Found], None]] = {
    "process": inference_process.measure,
    "generate": inference_generate.measure,
    "network": inference_network.measure,
}
"""Each part fills `Found`, given a folder of its own and whether to measure small sizes only."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark; 1 when a check does not hold."""
    parser = argparse.ArgumentParser(prog="benchmarks.inference", description=__doc__)
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that it runs")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    options = parser.parse_args(arguments)
    holds = True
    for part in options.parts:
        found = Found()
        about = machine()
        with tempfile.TemporaryDirectory(prefix="fedcore-inference-") as folder:
            try:
                PARTS[part](Path(folder), options.quick, found)
            except ProgramFailed as error:
                found.failures.append(f"{part}: {error}")
        _keep(options.out / "inference.json", part, {"machine": about, **asdict(found)})
        print(table(found), flush=True)
        holds = holds and not found.failures and all(check.holds for check in found.checks)
    return 0 if holds else 1


def _keep(path: Path, part: str, result: dict[str, Any]) -> None:
    parts = json.loads(path.read_text())["parts"] if path.exists() else {}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"parts": {**parts, part: result}})


if __name__ == "__main__":
    sys.exit(main())
