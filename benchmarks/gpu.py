"""The simulation benchmark's part for machines with an NVIDIA GPU."""

from __future__ import annotations

import shutil
import statistics
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from benchmarks.campaign import Outcome
from benchmarks.figures import Row, row
from benchmarks.measure import ProgramFailed
from benchmarks.systems import FEDCORE, Place, measure, seconds_per_round
from benchmarks.workloads import read_workload

WORKLOADS = ("w2", "w1", "w2_dp", "w1_dp")
COHORTS = (50, 500)
_QUERY = ("--query-gpu=memory.used,utilization.gpu", "--format=csv,noheader,nounits")
_EVERY_MS = 200
_WARMUP, _ROUNDS = 5, 30


@dataclass
class Samples:
    """What the driver said of all GPUs together, again and again."""

    memory_bytes: list[int] = field(default_factory=list)
    utilisation: list[float] = field(default_factory=list)
    """Share of time in which a kernel ran, over all GPUs, 0 to 1."""


def has_gpu() -> bool:
    """Whether the NVIDIA driver is there and lists a GPU."""
    if shutil.which("nvidia-smi") is None:
        return False
    return gpus() > 0


def gpus() -> int:
    """GPUs that the driver lists."""
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    return sum(line.startswith("GPU ") for line in listed.stdout.splitlines())


def run_gpu(place: Place, workloads: Sequence[str]) -> Outcome:
    """Fedcore on the GPU, with larger cohorts; speed, and what the GPU had to give for it."""
    rows: list[Row] = []
    failures: list[str] = []
    chosen: list[tuple[str, str, str]] = []
    for name in (name for name in WORKLOADS if name in workloads):
        for cohort in COHORTS:
            label = f"{name}@{cohort}"
            workload = replace(read_workload(name), cohort=cohort)
            settings = ("client.device=cuda", f"federation.cohort={cohort}")
            try:
                with sampled() as samples:
                    measured = measure(
                        FEDCORE, workload, rounds=_ROUNDS, seed=1, place=place, settings=settings
                    )
            except ProgramFailed as error:
                print(f"FAILED: {error}", file=sys.stderr, flush=True)
                failures.append(str(error))
                continue
            seconds = seconds_per_round(measured.ends_s, _WARMUP)
            rows += rows_of_gpu(label, cohort / seconds, samples)
            chosen.append((FEDCORE.name, label, measured.chosen))
    return Outcome((), tuple(rows), (), tuple(chosen), tuple(failures))


def rows_of_gpu(label: str, clients_per_s: float, samples: Samples) -> list[Row]:
    """The rows of one run; memory is the most that all GPUs held, their driver's part included."""
    rows = [row(FEDCORE.name, label, "gpu_clients_per_s", "1/s", [clients_per_s])]
    if samples.memory_bytes:
        busy = [share for share in samples.utilisation if share > 0] or [0.0]
        rows += [
            row(FEDCORE.name, label, "gpu_peak_bytes", "bytes", [max(samples.memory_bytes)]),
            row(FEDCORE.name, label, "gpu_utilisation", "fraction", [statistics.median(busy)]),
        ]
    return rows


@contextmanager
def sampled() -> Iterator[Samples]:
    """Asks the driver five times a second, until the block ends."""
    command = ["nvidia-smi", *_QUERY, f"--loop-ms={_EVERY_MS}"]
    samples, count = Samples(), gpus()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        lines = process.stdout
        reader = threading.Thread(target=lambda: take(lines, count, samples))
        reader.start()
        try:
            yield samples
        finally:
            process.terminate()
            reader.join()


def take(lines: Iterable[str], count: int, samples: Samples) -> None:
    """Reads samples, one line a GPU, ``count`` lines a time."""
    memory: list[int] = []
    shares: list[float] = []
    for line in lines:
        used, share = line.split(",")
        memory.append(int(used) << 20)
        shares.append(float(share) / 100)
        if len(memory) == count:
            samples.memory_bytes.append(sum(memory))
            samples.utilisation.append(statistics.fmean(shares))
            memory, shares = [], []
