"""Timing inference as a caller sees it."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from edge_client.runtime import Runtime
from fedcore.artifacts.golden import AnyArray

_WARM_UP_RUNS = 50


@dataclass(frozen=True)
class Timing:
    """Wall-clock time of one inference at batch 1, checks of the input included."""

    p50_us: float
    p99_us: float


def bench(runtime: Runtime, inputs: AnyArray, *, runs: int) -> Timing:
    """Times single inferences over ``inputs`` in turn.

    Args:
        runtime: The model.
        inputs: Shape ``(N, *input_shape)``, N >= 1.
        runs: Timed inferences, after a warm-up.
    """
    singles = [inputs[row : row + 1] for row in range(len(inputs))]
    for run in range(_WARM_UP_RUNS):
        runtime.predict(singles[run % len(singles)])
    times_us = np.empty(runs)
    for run in range(runs):
        single = singles[run % len(singles)]
        start_ns = time.perf_counter_ns()
        runtime.predict(single)
        times_us[run] = (time.perf_counter_ns() - start_ns) / 1e3
    p50_us, p99_us = np.percentile(times_us, [50, 99])
    return Timing(float(p50_us), float(p99_us))
