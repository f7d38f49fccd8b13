"""Running exported models as devices run them."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedcore.artifacts.parity import FloatArray
from fedcore.errors import CompressionError
from fedcore.task.definition import Examples
from fedcore.training.batches import in_order
from server.compression.export import INPUT

_BATCH_SIZE = 512  # examples read at a time


def open_session(onnx: bytes, *, threads: int) -> onnxruntime.InferenceSession:
    """An onnxruntime session on the CPU.

    Raises:
        CompressionError: onnxruntime cannot run the model.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3  # errors only, which are raised as well
    if threads > 1:  # a spinning pool would take cores from whatever is timed next
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        return onnxruntime.InferenceSession(onnx, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exceptions share no base of their own
        raise CompressionError(f"onnxruntime cannot load it: {error}") from error


def answer(session: onnxruntime.InferenceSession, inputs: NDArray[Any]) -> FloatArray:
    """Outputs ``(N, ...)`` for inputs ``(N, ...)``, each asked by itself as devices ask.

    One at a time because a dynamically quantised layer scales its activations by the largest value
    in the batch: asked together, the same inputs are answered differently.

    Raises:
        CompressionError: onnxruntime fails on an input.
    """
    try:
        rows = [session.run(None, {INPUT: inputs[i : i + 1]})[0] for i in range(len(inputs))]
    except Exception as error:  # as above
        raise CompressionError(f"onnxruntime cannot run it: {error}") from error
    return np.concatenate(rows).astype(np.float32, copy=False)


def answers(session: onnxruntime.InferenceSession, examples: Examples) -> tuple[FloatArray, Tensor]:
    """A model's outputs ``(N, ...)`` for all examples, and their targets ``(N, ...)``."""
    outputs, targets = [], []
    for inputs, target in in_order(examples, _BATCH_SIZE):
        outputs.append(answer(session, inputs.numpy()))
        targets.append(target)
    return np.concatenate(outputs), torch.cat(targets)
