"""Self-test of a model on this device: its outputs must match the golden outputs of the cloud."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from edge_client.inference.confined import predict
from edge_client.inference.named import outputs_by_name
from edge_client.inference.process import ModelLimits
from fedcore.artifacts.golden import Golden, parse_golden
from fedcore.artifacts.manifest import Manifest
from fedcore.artifacts.parity import FloatArray, max_abs_error
from fedcore.errors import DataError, DeviceError, SelfTestFailed

_MOST_TOLERANCE, _MOST_OF_PLACES = 0.1, 1.0
"""Largest tolerance that a test may have, over the largest golden output: twice that of quantised
models; and where the golden file has some places of the outputs, of which others may be larger."""
_SMALLEST_SCALE = 1e-6  # outputs that are always 0 have the tolerance of this one


def self_test(
    manifest: Manifest, onnx: Path, golden: bytes, *, threads: int, limits: ModelLimits
) -> float:
    """Runs the model on its golden inputs in a child process, and compares the outputs.

    The inputs go in one call, as `fedcore device infer` sends them; the golden outputs were
    computed one input at a time. So equal outputs also show that no input affects another's.

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
    stored = parse_golden(golden)
    if not stored.inputs.size:
        raise SelfTestFailed(_message(manifest, "it has none, so they would prove nothing."))
    try:
        outputs = predict(manifest, onnx, stored.inputs, threads=threads, limits=limits)
    except (DataError, DeviceError) as error:
        raise SelfTestFailed(_message(manifest, f"it failed on these inputs: {error}")) from error
    return compared(manifest, stored, outputs)


def compared(manifest: Manifest, stored: Golden, outputs: FloatArray) -> float:
    """Returns the largest absolute difference of outputs from the golden ones.

    Args:
        manifest: The model's manifest.
        stored: The golden inputs and outputs.
        outputs: What the model answered to the golden inputs, shape ``(N, ...)``.

    Raises:
        SelfTestFailed: the outputs have another shape, or differ by more than the manifest allows.
    """
    found = stored.stored_part(outputs)
    if found is None:
        of = "" if stored.places is None else f" (places up to {stored.places.max(initial=0)})"
        raise SelfTestFailed(
            _message(
                manifest,
                f"expected outputs of shape {stored.outputs.shape}{of}, got {outputs.shape}.",
            )
        )
    if manifest.outputs is not None and stored.places is None:
        return _compared_by_name(manifest, stored, found)
    largest = max(float(np.abs(stored.outputs).max(initial=0.0)), _SMALLEST_SCALE)
    most = largest * (_MOST_TOLERANCE if stored.places is None else _MOST_OF_PLACES)
    if stored.outputs.size and manifest.golden_tolerance > most:
        raise SelfTestFailed(
            _message(
                manifest,
                f"its manifest allows a difference of {manifest.golden_tolerance:.3g} where the "
                f"largest output is {largest:.3g}, so they would prove nothing.",
            )
        )
    error_abs = max_abs_error(stored.outputs, found)
    if error_abs > manifest.golden_tolerance:
        raise SelfTestFailed(
            _message(
                manifest,
                f"an output differs by {error_abs:.3g}, more than the "
                f"{manifest.golden_tolerance:.3g} allowed.",
            )
        )
    return error_abs


def _compared_by_name(manifest: Manifest, stored: Golden, outputs: FloatArray) -> float:
    """Compares each of several outputs by its own tolerance."""
    assert manifest.outputs is not None
    try:
        expected = outputs_by_name(manifest, stored.outputs)
    except DeviceError as error:
        raise SelfTestFailed(_message(manifest, str(error))) from error
    found = outputs_by_name(manifest, outputs)
    return max(
        compared(
            manifest.of_output(each),
            Golden(stored.inputs, expected[each.name]),
            found[each.name],
        )
        for each in manifest.outputs
    )


def _message(manifest: Manifest, what: str) -> str:
    return (
        f"model {manifest.model!r} version {manifest.version}: on this device it does not "
        f"reproduce its golden outputs: {what} It was not activated; the previous version keeps "
        "serving. Report this device's processor to the model's publisher."
    )
