"""A million inputs of every format, as a part of the campaign: see `tests.fuzz`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tests.campaign.site import ROOT
from tests.fuzz.drive import FORMATS, SHARES


def fuzz_everything(inputs: int, seed: int, failing: Path) -> dict[str, Any]:
    """Reads ``inputs`` of all formats together, each format in a process of its own.

    Args:
        inputs: How many.
        seed: The same one gives the same inputs.
        failing: Folder for inputs that fail.
    """
    started = time.monotonic()

    def one(name: str) -> dict[str, Any]:
        words = ["--only", name, "--inputs", str(round(SHARES[name] * inputs))]
        words += ["--seed", str(seed), "--failing", str(failing)]
        done = subprocess.run(
            [sys.executable, "-m", "tests.fuzz.drive", *words],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
        try:
            told: dict[str, Any] = json.loads(done.stdout)
        except ValueError:
            ended = f"it ended ({done.returncode}): {done.stderr[-2000:]}"
            return {"format": name, "inputs": 0, "failures": [ended]}
        print(json.dumps(told), flush=True)
        return told

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        lines = [*pool.map(one, FORMATS)]
    return {
        "name": "fuzz",
        "seconds": round(time.monotonic() - started, 1),
        "counts": {line["format"]: line["inputs"] for line in lines},
        "formats": lines,
        "wrong": [f"{line['format']}: {why}" for line in lines for why in line["failures"]],
    }
