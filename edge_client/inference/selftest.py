"""Self-test of a model on this device: its outputs must match the golden outputs of the cloud."""

from __future__ import annotations

from pathlib import Path

from edge_client.inference.confined import ModelLimits, predict
from fedcore.artifacts.golden import parse_golden
from fedcore.artifacts.manifest import Manifest
from fedcore.artifacts.parity import max_abs_error
from fedcore.errors import DataError, DeviceError, SelfTestFailed


def self_test(
    manifest: Manifest, onnx: Path, golden: bytes, *, threads: int, limits: ModelLimits
) -> float:
    """Runs the model on its golden inputs in a child process, and compares the outputs.

    Args:
        manifest: The model's manifest.
        onnx: The model's file, whose digest has been checked.
        golden: The release's golden file: inputs ``(N, ...)`` and outputs ``(N, ...)``.
        threads: Threads of one inference.
        limits: Time and memory for the child process.

    Returns:
        The largest absolute difference, at most ``manifest.golden_tolerance``.

    Raises:
        TrustError: ``golden`` is not a valid golden file.
        SelfTestFailed: there are no golden inputs; or the model cannot run, exceeds its limits,
            fails on the inputs, or answers differently.
        ResourceError: no process could be started.
    """
    inputs, expected = parse_golden(golden)
    if not inputs.size:
        raise SelfTestFailed(_message(manifest, "it has none, so they would prove nothing."))
    try:
        outputs = predict(
            manifest, onnx, inputs, threads=threads, limits=limits, one_at_a_time=True
        )
    except (DataError, DeviceError) as error:
        raise SelfTestFailed(_message(manifest, f"it failed on these inputs: {error}")) from error
    if outputs.shape != expected.shape:
        raise SelfTestFailed(
            _message(manifest, f"expected outputs of shape {expected.shape}, got {outputs.shape}.")
        )
    error_abs = max_abs_error(expected, outputs)
    if error_abs > manifest.golden_tolerance:
        raise SelfTestFailed(
            _message(
                manifest,
                f"an output differs by {error_abs:.3g}, more than the "
                f"{manifest.golden_tolerance:.3g} allowed.",
            )
        )
    return error_abs


def _message(manifest: Manifest, what: str) -> str:
    return (
        f"model {manifest.model!r} version {manifest.version}: on this device it does not "
        f"reproduce its golden outputs: {what} It was not activated; the previous version keeps "
        "serving. Report this device's processor to the model's publisher."
    )
