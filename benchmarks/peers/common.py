"""What all peers share: their command line, the answer they print, and who takes part."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from benchmarks.workloads import Workload, read_workload


@dataclass(frozen=True)
class Request:
    """One run of a peer."""

    workload: Workload
    rounds: int
    seed: int
    data: Path
    """The prepared partition."""
    stock: bool
    """Leave the memory format of images as it is instead of taking the quickest one."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a run came to; printed as one JSON line."""

    ends_s: list[float]
    """When each round ended, by the machine's monotonic clock, which all processes share."""
    accuracy: float
    """On the test images, after the last round, outside the timed part."""
    bytes_per_round: int | None = None
    """Payload both ways; None where clients and server are one process and nothing travels."""
    epsilon: float | None = None
    """Of one participation in one round."""
    epsilon_max: float | None = None
    """The most that any client spent."""
    chosen: Mapping[str, str | int] = field(default_factory=dict)
    """The options of this system that were found quickest here."""


def read_request() -> Request:
    """Reads the command line of a peer."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--workload", required=True)
    parser.add_argument("--rounds", type=int, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--stock", action="store_true")
    options = parser.parse_args()
    workload = read_workload(options.workload)
    return Request(workload, options.rounds, options.seed, options.data, options.stock)


def answer(result: Result) -> None:
    """Prints the result for the benchmark to read."""
    print(json.dumps(asdict(result)), flush=True)


def cohorts(request: Request, clients: int) -> list[list[int]]:
    """Who takes part in each round: uniform, without replacement."""
    rng = np.random.default_rng(request.seed)
    size = request.workload.cohort
    return [rng.choice(clients, size, replace=False).tolist() for _ in range(request.rounds)]


def now_s() -> float:
    """The monotonic clock that the benchmark reads, too."""
    return time.monotonic()
