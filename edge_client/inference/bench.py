"""Timing inference where a model may do no harm: in a process of its own, with limits."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from edge_client.inference.confined import ModelLimits, time_runs
from fedcore.artifacts.golden import AnyArray
from fedcore.artifacts.manifest import Manifest


@dataclass(frozen=True)
class InferenceTiming:
    """Wall-clock time of one inference at batch 1 on one thread, measured beside the model."""

    p50_us: float
    p99_us: float


def bench(
    manifest: Manifest, onnx: Path, inputs: AnyArray, *, runs: int, limits: ModelLimits
) -> InferenceTiming:
    """Times single inferences over ``inputs`` in turn.

    Args:
        manifest: Of the model.
        onnx: Its file.
        inputs: Shape ``(N, *input_shape)``, N >= 1.
        runs: Timed inferences, after a warm-up.
        limits: What the model may take, all runs together.

    Raises:
        LimitExceeded: it took more.
        DataError, DeviceError, ResourceError: as `edge_client.inference.confined.predict`.
    """
    p50_us, p99_us = time_runs(manifest, onnx, inputs, runs=runs, limits=limits)
    return InferenceTiming(float(p50_us), float(p99_us))
