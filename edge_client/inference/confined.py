"""Runs an untrusted model once, in a child process with limits on time and memory.

`edge_client.inference.process` keeps such a process for many calls.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from edge_client.inference.process import ModelLimits, ModelProcess, named
from fedcore.artifacts.golden import AnyArray
from fedcore.artifacts.manifest import Manifest
from fedcore.artifacts.parity import FloatArray
from fedcore.errors import DataError, DeviceError
from fedcore.observability.foreign import foreign

MAX_RUNS = 10_000_000
"""Most inferences that one call may time."""


def predict(
    manifest: Manifest,
    onnx: Path,
    inputs: AnyArray,
    *,
    threads: int,
    limits: ModelLimits,
) -> FloatArray:
    """Computes a model's outputs in a child process, each input as a batch of its own.

    Guarantee:
        The outputs of an input depend on no other input, whatever the model. The call returns or
        raises within little more than ``limits.seconds``. The child has ended by then; it also ends
        when this process does, for whatever reason.

    Args:
        manifest: The model's manifest.
        onnx: The model's file; run only if it has the manifest's digest.
        inputs: Shape ``(B, *manifest.input_shape)``, dtype ``manifest.input_dtype``, B >= 1.
        threads: Threads of one inference.
        limits: Time and memory for the child.

    Returns:
        Outputs ``(B, ...)``.

    Raises:
        DataError: the inputs have another shape or type.
        LimitExceeded: the model exceeded its limits, or its outputs are too large.
        DeviceError: onnxruntime cannot run the model, or failed; or the file has changed.
        ResourceError: no process could be started.
    """
    check_inputs(manifest, inputs)
    with ModelProcess(
        manifest, onnx, threads=threads, limits=limits, input_bytes=inputs.nbytes
    ) as process:
        return process.ask([inputs], rows=len(inputs))[0]


def time_runs(
    manifest: Manifest, onnx: Path, inputs: AnyArray, *, runs: int, limits: ModelLimits
) -> FloatArray:
    """Times single inferences on one thread in a child process, by the child's clock.

    Guarantee:
        The call returns or raises within little more than ``limits.seconds``. The child has ended
        by then; it also ends when this process does, for whatever reason.

    Args:
        manifest: The model's manifest.
        onnx: The model's file; run only if it has the manifest's digest.
        inputs: Shape ``(B, *manifest.input_shape)``; each in turn is a batch of its own.
        runs: Number of timed inferences, 1 to `MAX_RUNS`, after a warm-up.
        limits: Time and memory for the child, including the warm-up.

    Returns:
        Median and 99th percentile, shape ``(2,)``, microseconds.

    Raises:
        DataError: the inputs have another shape or type.
        LimitExceeded: the model exceeded its limits.
        DeviceError: onnxruntime cannot run the model, or failed; or the file has changed.
        ResourceError: no process could be started.
    """
    if not 1 <= runs <= MAX_RUNS:
        raise ValueError(f"runs: expected 1 to {MAX_RUNS}, got {runs}")
    check_inputs(manifest, inputs)
    with ModelProcess(
        manifest, onnx, threads=1, limits=limits, input_bytes=inputs.nbytes
    ) as process:
        found = process.ask([inputs], runs=runs)[0]
    if found.shape != (2,) or not np.isfinite(found).all():
        raise DeviceError(
            f"{named(manifest)}: the timing failed: it returned times of shape {found.shape}."
        )
    return found


def check_inputs(manifest: Manifest, inputs: AnyArray) -> None:
    """Checks that inputs have the shape and type of the manifest.

    Raises:
        DataError: they have not.
        DeviceError: the manifest's type is not numeric.
    """
    expected = manifest.input_shape
    if inputs.ndim == 0 or inputs.shape[1:] != expected or len(inputs) == 0:
        raise DataError(
            f"input: expected shape (batch, {', '.join(map(str, expected))}) with a batch of at "
            f"least 1, got {inputs.shape}. Nothing was answered."
        )
    try:
        dtype = np.dtype(manifest.input_dtype)
    except (TypeError, ValueError, SyntaxError):
        dtype = np.dtype(object)
    if dtype.kind not in "fiub":
        raise DeviceError(
            f"{named(manifest)}: its inputs are of type {foreign(manifest.input_dtype, 50)!r}, "
            "which is not a numeric type. It is not served."
        )
    if inputs.dtype != dtype:
        raise DataError(f"input: expected type {dtype}, got {inputs.dtype}. Nothing was answered.")
