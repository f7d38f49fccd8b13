"""The self-test: this device must get the answers that the cloud got."""

from __future__ import annotations

import numpy as np

from edge_client.runtime import Runtime
from fedcore.artifacts.golden import parse_golden
from fedcore.artifacts.parity import max_abs_error
from fedcore.errors import DataError, DeviceError, SelfTestFailed


def self_test(runtime: Runtime, golden: bytes) -> float:
    """Runs the golden inputs and compares with the golden outputs.

    Args:
        runtime: The model to test.
        golden: Inputs ``(N, ...)`` and outputs ``(N, ...)``, as delivered with it.

    Returns:
        The largest absolute difference, at most ``manifest.golden_tolerance``.

    Raises:
        TrustError: ``golden`` is no golden file.
        SelfTestFailed: the model fails on the golden inputs, or answers differently.
    """
    manifest = runtime.manifest
    inputs, expected = parse_golden(golden)
    if not len(inputs):
        raise SelfTestFailed(_message(runtime, "there are none, so they would prove nothing."))
    try:
        # One at a time, as they were made: dynamic int8 takes its scale from the whole batch.
        rows = [runtime.predict(inputs[row : row + 1]) for row in range(len(inputs))]
        outputs = np.concatenate(rows)
    except (DataError, DeviceError) as error:
        raise SelfTestFailed(_message(runtime, f"it failed on them: {error}")) from error
    if outputs.shape != expected.shape:
        raise SelfTestFailed(
            _message(runtime, f"expected outputs of shape {expected.shape}, got {outputs.shape}.")
        )
    error_abs = max_abs_error(expected, outputs)
    if error_abs > manifest.golden_tolerance:
        raise SelfTestFailed(
            _message(
                runtime,
                f"an output differs by {error_abs:.3g}, more than the "
                f"{manifest.golden_tolerance:.3g} allowed.",
            )
        )
    return error_abs


def _message(runtime: Runtime, what: str) -> str:
    manifest = runtime.manifest
    return (
        f"model {manifest.model!r} version {manifest.version}: on this device it does not "
        f"reproduce its golden outputs: {what} It was not activated; the version before keeps "
        "serving. Report this device's processor to whoever publishes."
    )
