"""Examples of DDP: as many processes as one likes train what one process trains."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

DDP = Path(__file__).parents[2] / "examples" / "ddp"
LINE = re.compile(r"(.+): accuracy (\S+) .* last loss (\S+), .* by at most (\S+) from")


def figures_of(script: str, data: Path) -> dict[str, tuple[float, ...]]:
    """Runs an example as a user does; returns accuracy, loss and distance of each way."""
    done = subprocess.run(
        [sys.executable, DDP / script],
        env={**os.environ, "OMP_NUM_THREADS": "1", "FEDCORE_DATA": str(data)},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = [LINE.match(line) for line in done.stdout.splitlines()]
    return {one[1]: tuple(map(float, one.groups()[1:])) for one in found if one}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_softmax_regression_by_two_processes_is_that_of_one(data_folder: Path) -> None:
    alone, together = figures_of("softmax.py", data_folder).values()
    assert alone[0] > 0.86  # a chance of 0.1
    assert together[0] == pytest.approx(alone[0], abs=1e-3)
    assert 0 < together[2] < 1e-5  # another order of sums, so not the same process again


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_an_mlp_learns_in_two_processes_and_in_half_precision(data_folder: Path) -> None:
    alone, together, half = figures_of("mlp.py", data_folder).values()
    assert alone[0] > 0.86
    assert 0 < together[2] < 1e-4
    assert 1e-4 < half[2] < 0.1  # rounded to 8 bits, yet the same training
    assert half[1] == pytest.approx(alone[1], rel=0.02)
