"""onnxruntime sessions with the settings for inference on a device."""

from __future__ import annotations

from typing import Any

import onnxruntime

_SILENT = 4  # onnxruntime's severity "fatal": errors arrive as exceptions anyway
_AS_ONNX = ("session.load_model_format", "ONNX")
"""Reads a file as nothing but ONNX; a mark in it could otherwise choose another reader."""


def open_session(onnx: bytes, *, threads: int) -> Any:
    """Opens a model as an `onnxruntime.InferenceSession` on the CPU.

    Args:
        onnx: The content of the model's file.
        threads: Threads of one inference. If more than 1, idle threads sleep instead of spinning.

    Raises:
        Exception: onnxruntime cannot load the model; its errors have no common base class.
        ValueError: the model has no input or no output.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _SILENT
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.add_session_config_entry(*_AS_ONNX)
    if threads > 1:
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(onnx, options, providers=["CPUExecutionProvider"])
    counts = len(session.get_inputs()), len(session.get_outputs())
    if not all(counts):
        raise ValueError(f"expected inputs and outputs, found {counts[0]} and {counts[1]}")
    return session
