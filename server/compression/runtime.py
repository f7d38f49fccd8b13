"""Inference with exported models, exactly as devices run them."""

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
    """Creates an onnxruntime session on the CPU.

    Raises:
        CompressionError: onnxruntime can't load the model.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3  # errors only; they are raised, too
    if threads > 1:  # a spinning pool would disturb later timings
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        return onnxruntime.InferenceSession(onnx, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime has no common base exception
        raise CompressionError(f"onnxruntime cannot load it: {error}") from error


def answer(session: onnxruntime.InferenceSession, inputs: NDArray[Any]) -> FloatArray:
    """Computes outputs ``(N, ...)`` for inputs ``(N, ...)``, one input at a time like devices.

    A dynamically quantised layer scales its activations by the largest value in the batch, so
    batched outputs would differ.

    Raises:
        CompressionError: onnxruntime fails on an input.
    """
    try:
        rows = [session.run(None, {INPUT: inputs[i : i + 1]})[0] for i in range(len(inputs))]
    except Exception as error:  # onnxruntime has no common base exception
        raise CompressionError(f"onnxruntime cannot run it: {error}") from error
    return np.concatenate(rows).astype(np.float32, copy=False)


def answers(session: onnxruntime.InferenceSession, examples: Examples) -> tuple[FloatArray, Tensor]:
    """Returns a model's outputs ``(N, ...)`` for all examples, and their targets ``(N, ...)``.

    Raises:
        CompressionError: onnxruntime fails on an input.
    """
    outputs, targets = [], []
    for inputs, target in in_order(examples, _BATCH_SIZE):
        outputs.append(answer(session, inputs.numpy()))
        targets.append(target)
    return np.concatenate(outputs), torch.cat(targets)
