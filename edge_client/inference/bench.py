"""Latency of single inferences, measured in a child process with limits."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from edge_client.inference.confined import time_runs
from edge_client.inference.process import ModelLimits
from fedcore.artifacts.golden import AnyArray
from fedcore.artifacts.manifest import Manifest


@dataclass(frozen=True)
class InferenceTiming:
    """Wall-clock latency at batch size 1 on one thread, measured in the model's own process."""

    p50_us: float
    p99_us: float


def bench(
    manifest: Manifest, onnx: Path, inputs: AnyArray, *, runs: int, limits: ModelLimits
) -> InferenceTiming:
    """Times single inferences, cycling through ``inputs``.

    Args:
        manifest: The model's manifest.
        onnx: The model's file.
        inputs: Shape ``(N, *input_shape)``, N >= 1.
        runs: Number of timed inferences, after a warm-up.
        limits: Time and memory for all runs together.

    Raises:
        DataError: the inputs have another shape or type.
        LimitExceeded: the model exceeded its limits.
        DeviceError: onnxruntime cannot run the model, or failed.
        ResourceError: no process could be started.
    """
    p50_us, p99_us = time_runs(manifest, onnx, inputs, runs=runs, limits=limits)
    return InferenceTiming(float(p50_us), float(p99_us))
