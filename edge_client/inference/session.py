"""One way to open a model in onnxruntime, for whichever process it is to run in."""

from __future__ import annotations

from typing import Any

import onnxruntime

_SILENT = 4  # onnxruntime's severity "fatal": what goes wrong arrives as an exception


def open_session(onnx: bytes, *, threads: int) -> Any:
    """An `onnxruntime.InferenceSession` on the processor.

    Args:
        onnx: The model.
        threads: Of one inference. Above 1, idle threads sleep rather than spin.

    Raises:
        Exception: onnxruntime cannot run the model; its errors share no class of their own.
        ValueError: it does not have one input and one output.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _SILENT
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    if threads > 1:
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(onnx, options, providers=["CPUExecutionProvider"])
    counts = len(session.get_inputs()), len(session.get_outputs())
    if counts != (1, 1):
        raise ValueError(f"expected one input and one output, found {counts[0]} and {counts[1]}")
    return session
