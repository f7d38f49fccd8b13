"""Running a released model in this process, without torch: one that has passed its self-test."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import onnxruntime

from edge_client.session import open_session
from fedcore.artifacts.golden import AnyArray
from fedcore.artifacts.manifest import Manifest
from fedcore.artifacts.parity import FloatArray
from fedcore.errors import DataError, DeviceError


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


def load(manifest: Manifest, onnx: bytes, *, threads: int) -> Runtime:
    """Prepares a model for serving. Callers in several threads take turns.

    Args:
        manifest: Of the model.
        onnx: The model; its digest has been checked.
        threads: Of one inference. Above 1, idle threads sleep rather than spin.

    Raises:
        DeviceError: onnxruntime on this device cannot run the model.
    """
    try:
        session = open_session(onnx, threads=threads)
        dtype = np.dtype(manifest.input_dtype)
    except Exception as error:  # as above; and a type that NumPy does not know
        raise DeviceError(
            f"model {manifest.model!r} version {manifest.version}: onnxruntime "
            f"{onnxruntime.__version__} on this device cannot run it: {error}. It does not serve."
        ) from error
    return Runtime(manifest, session, session.get_inputs()[0].name, dtype)
