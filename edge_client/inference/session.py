"""onnxruntime sessions with the settings for inference on a device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import onnxruntime

CPU = "CPUExecutionProvider"
ACCELERATED = (
    "TensorrtExecutionProvider",
    "CUDAExecutionProvider",
    "OpenVINOExecutionProvider",
    "CoreMLExecutionProvider",
    "XnnpackExecutionProvider",
)
"""Execution providers that are tried where this machine's onnxruntime has them."""
_SILENT = 4  # onnxruntime's severity "fatal": errors arrive as exceptions anyway
_AS_ONNX = ("session.load_model_format", "ONNX")
"""Reads a file as nothing but ONNX; a mark in it could otherwise choose another reader."""


@dataclass(frozen=True)
class SessionSettings:
    """How onnxruntime runs a model."""

    threads: int = 1
    """Threads of one inference."""
    spinning: bool = False
    """Whether idle threads spin instead of sleeping: faster, at the price of a busy processor."""
    parallel: bool = False
    """Whether independent operators run at the same time."""
    provider: str = CPU
    """The execution provider; what it does not support runs on the CPU."""


def open_session(onnx: bytes, settings: SessionSettings) -> Any:
    """Opens a model as an `onnxruntime.InferenceSession`.

    Args:
        onnx: The content of the model's file.
        settings: How to run it.

    Raises:
        Exception: onnxruntime cannot load the model; its errors have no common base class.
        ValueError: the model has no input or no output.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _SILENT
    options.intra_op_num_threads = settings.threads
    options.inter_op_num_threads = settings.threads if settings.parallel else 1
    if settings.parallel:
        options.execution_mode = onnxruntime.ExecutionMode.ORT_PARALLEL
    options.add_session_config_entry(*_AS_ONNX)
    if settings.threads > 1:
        spinning = "1" if settings.spinning else "0"
        options.add_session_config_entry("session.intra_op.allow_spinning", spinning)
        options.add_session_config_entry("session.inter_op.allow_spinning", spinning)
    session = onnxruntime.InferenceSession(
        onnx,
        options,
        providers=list(dict.fromkeys((settings.provider, CPU))),
        enable_fallback=0,
        read_config_from_model=0,  # a file chooses no settings, whatever the environment says
    )
    counts = len(session.get_inputs()), len(session.get_outputs())
    if not all(counts):
        raise ValueError(f"expected inputs and outputs, found {counts[0]} and {counts[1]}")
    return session
