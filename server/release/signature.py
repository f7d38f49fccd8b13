"""What a released ONNX file takes and returns, found by running it on its golden inputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fedcore.artifacts.golden import AnyArray, Golden, parse_golden
from fedcore.artifacts.manifest import Manifest
from fedcore.artifacts.parity import FloatArray, max_abs_error
from fedcore.errors import ReleaseError, TrustError

if TYPE_CHECKING:
    import onnxruntime

_DATATYPES = {
    "tensor(bool)": "BOOL",
    "tensor(uint8)": "UINT8",
    "tensor(int8)": "INT8",
    "tensor(int16)": "INT16",
    "tensor(int32)": "INT32",
    "tensor(int64)": "INT64",
    "tensor(float16)": "FP16",
    "tensor(float)": "FP32",
    "tensor(double)": "FP64",
}
"""Names of the Open Inference Protocol, by those of onnxruntime."""
_ONE_AT_A_TIME = "int8_dynamic"
"""The candidate whose layers scale each input by the largest number of its batch."""


@dataclass(frozen=True)
class ModelTensor:
    """The input or the output of a model, without the batch dimension."""

    name: str
    datatype: str
    """Name of the Open Inference Protocol, such as ``FP32``."""
    shape: tuple[int, ...]
    """-1 where a dimension is free."""


@dataclass(frozen=True)
class ModelSignature:
    """Input and output of a released model, and how many inputs it may answer together."""

    input: ModelTensor
    output: ModelTensor
    max_batch_size: int
    """The number of golden inputs, if they have the golden outputs in one batch too; else 1."""


def read_signature(manifest: Manifest, onnx: bytes, golden: bytes) -> ModelSignature:
    """Runs a model on its golden inputs, one by one and in one batch, and describes it.

    Args:
        manifest: The model's manifest.
        onnx: The model's file, whose digest has been checked.
        golden: The release's golden file, whose digest has been checked.

    Raises:
        ReleaseError: the file cannot be run, answers other than its golden outputs, or has another
            form than released models have.
    """
    import onnxruntime  # here, as it slows other commands down

    try:
        stored = parse_golden(golden)
    except TrustError as error:
        raise _refused(manifest, str(error)) from error
    try:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 3  # errors only; they are raised, too
        session = onnxruntime.InferenceSession(onnx, options, providers=["CPUExecutionProvider"])
        one, other = _described(manifest, session)
        single = [_run(session, one, stored.inputs[i : i + 1]) for i in range(len(stored.inputs))]
        together = _run(session, one, stored.inputs)
    except ReleaseError:
        raise
    except Exception as error:  # onnxruntime has no common base exception
        raise _refused(manifest, f"onnxruntime cannot run it: {error}.") from error
    difference = _difference(stored, np.concatenate(single))
    if not difference <= manifest.golden_tolerance:
        raise _refused(
            manifest,
            f"its answers differ from its golden outputs by {difference:.3g}, more than the "
            f"{manifest.golden_tolerance:.3g} allowed.",
        )
    batched = (
        manifest.lineage.candidate != _ONE_AT_A_TIME
        and _difference(stored, together) <= manifest.golden_tolerance
    )
    return ModelSignature(one, other, len(stored.inputs) if batched else 1)


def _described(
    manifest: Manifest, session: onnxruntime.InferenceSession
) -> tuple[ModelTensor, ModelTensor]:
    values = [*session.get_inputs(), *session.get_outputs()]
    if len(values) != 2 or any(isinstance((value.shape or [1])[0], int) for value in values):
        raise _refused(manifest, "expected one input and one output, each with a free batch size.")
    one, other = (
        ModelTensor(
            value.name,
            _DATATYPES.get(value.type, ""),
            tuple(size if isinstance(size, int) else -1 for size in value.shape[1:]),
        )
        for value in values
    )
    if not one.datatype or not other.datatype:
        types = ", ".join(value.type for value in values)
        raise _refused(manifest, f"other servers do not know its types ({types}).")
    if one.shape != manifest.input_shape:
        raise _refused(
            manifest,
            f"its file takes inputs of shape {one.shape}, its manifest says "
            f"{manifest.input_shape}.",
        )
    return one, other


def _run(session: onnxruntime.InferenceSession, one: ModelTensor, inputs: AnyArray) -> FloatArray:
    (outputs,) = session.run(None, {one.name: inputs})
    return np.asarray(outputs).astype(np.float32, copy=False)


def _difference(stored: Golden, outputs: FloatArray) -> float:
    part = stored.stored_part(outputs)
    return float("inf") if part is None else max_abs_error(stored.outputs, part)


def _refused(manifest: Manifest, what: str) -> ReleaseError:
    return ReleaseError(
        f"{manifest.model} version {manifest.version}: {what} Nothing was exported; publish a "
        "version that works here, or export another with --version."
    )
