"""Hostile messages by the thousand, as a part of the campaign: the tests of that name, counted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tests.campaign.site import ROOT

GROWTH_BYTES = 64 * 2**20
"""What memory may grow by over all messages of a class, in the process of server and rogues."""


def send_hostile(count: int, told: Path) -> dict[str, Any]:
    """Sends ``count`` messages of each class to a live server; returns what came of it.

    Args:
        count: Of each class.
        told: File that the tests write a line to for each class.
    """
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/e2e/live/hostile"],
        cwd=ROOT,
        env=os.environ | {"FEDCORE_HOSTILE": str(count), "FEDCORE_HOSTILE_TOLD": str(told)},
        capture_output=True,
        text=True,
    )
    lines = [json.loads(line) for line in told.open()] if told.exists() else []
    wrong = [] if done.returncode == 0 else [done.stdout[-3000:]]
    for line in lines:
        grown = line["memory_after_bytes"] - line["memory_before_bytes"]
        if grown > GROWTH_BYTES:
            wrong.append(f"{line['class']}: memory grew by {grown / 2**20:.0f} MiB")
    return {
        "name": "hostile",
        "seconds": round(time.monotonic() - started, 1),
        "counts": {line["class"]: line["sent"] for line in lines},
        "classes": lines,
        "wrong": wrong,
    }
