"""Running a released model with onnxruntime, without torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import onnxruntime

from fedcore.artifacts.golden import AnyArray
from fedcore.artifacts.manifest import Manifest
from fedcore.artifacts.parity import FloatArray
from fedcore.errors import DataError, DeviceError

_SILENT = 4  # onnxruntime's severity "fatal": what goes wrong arrives as an exception


@dataclass(frozen=True)
class Runtime:
    """A model that is ready to answer; safe to call from several threads."""

    manifest: Manifest
    session: Any = field(repr=False)
    input_name: str
    dtype: np.dtype[Any]

    def predict(self, inputs: AnyArray) -> FloatArray:
        """The model's outputs for a batch.

        Args:
            inputs: Shape ``(B, *manifest.input_shape)``, dtype ``manifest.input_dtype``, B >= 1.

        Returns:
            Outputs ``(B, ...)``: logits by class or by token, or the predicted values.

        Raises:
            DataError: the shape or the type is another.
            DeviceError: onnxruntime failed.
        """
        expected = self.manifest.input_shape
        if inputs.shape[1:] != expected or inputs.ndim == 0 or len(inputs) == 0:
            raise DataError(
                f"input: expected shape (batch, {', '.join(map(str, expected))}) with a batch of "
                f"at least 1, got {inputs.shape}. Nothing was answered."
            )
        if inputs.dtype != self.dtype:
            raise DataError(
                f"input: expected type {self.dtype}, got {inputs.dtype}. Nothing was answered."
            )
        try:
            return cast(FloatArray, self.session.run(None, {self.input_name: inputs})[0])
        except Exception as error:  # onnxruntime's errors share no class of their own
            raise DeviceError(
                f"model {self.manifest.model!r} version {self.manifest.version}: onnxruntime "
                f"failed on an input of shape {inputs.shape}: {error}. Nothing was answered."
            ) from error

    def labels(self, outputs: FloatArray) -> list[str]:
        """The name of the most likely class of each row; its number where classes have no names.

        Args:
            outputs: Of a classification, shape ``(B, C)``.
        """
        classes = outputs.argmax(axis=-1)
        names = self.manifest.labels
        return [names[row] if row < len(names) else str(row) for row in classes.tolist()]


def load(manifest: Manifest, onnx: bytes, *, threads: int) -> Runtime:
    """Prepares a model for serving. Callers in several threads take turns.

    Args:
        manifest: Of the model.
        onnx: The model; its digest has been checked.
        threads: Of one inference. Above 1, idle threads sleep rather than spin.

    Raises:
        DeviceError: onnxruntime on this device cannot run the model.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _SILENT
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    if threads > 1:
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        session = onnxruntime.InferenceSession(onnx, options, providers=["CPUExecutionProvider"])
        dtype = np.dtype(manifest.input_dtype)
    except Exception as error:  # as above; and a type that NumPy does not know
        raise DeviceError(
            f"model {manifest.model!r} version {manifest.version}: onnxruntime "
            f"{onnxruntime.__version__} on this device cannot run it: {error}. It does not serve."
        ) from error
    inputs = session.get_inputs()
    if len(inputs) != 1 or len(session.get_outputs()) != 1:
        raise DeviceError(
            f"model {manifest.model!r} version {manifest.version}: expected one input and one "
            f"output, found {len(inputs)} and {len(session.get_outputs())}. It does not serve."
        )
    return Runtime(manifest, session, inputs[0].name, dtype)
