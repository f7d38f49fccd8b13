"""A next-token model in ONNX, small enough to be made and run in no time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper, numpy_helper

WINDOW, TOKENS, WIDTH = 8, 5, 4
FUTURE = np.triu(np.full((WINDOW, WINDOW), -np.inf, np.float32), 1)


def attention(mask: NDArray[np.float32] = FUTURE, more: Sequence[NodeProto] = ()) -> bytes:
    """Attention to earlier places: tokens ``input`` (B, 8) to logits ``output`` (B, 8, 5).

    Args:
        mask: Added to the scores (8, 8).
        more: Operators between the tensors ``h`` and ``hidden``, which the logits are made of.
    """
    rng = np.random.default_rng(7)
    weights = {
        "embed": (TOKENS, WIDTH),
        "places": (WINDOW, WIDTH),
        **dict.fromkeys(("wq", "wk", "wv"), (WIDTH, WIDTH)),
        "head": (WIDTH, TOKENS),
    }
    node = helper.make_node
    nodes = [
        node("Gather", ["embed", "input"], ["tokens"]),
        node("Add", ["tokens", "places"], ["x"]),
        *(node("MatMul", ["x", f"w{part}"], [part]) for part in "qkv"),
        node("Transpose", ["k"], ["kt"], perm=[0, 2, 1]),
        node("MatMul", ["q", "kt"], ["scores"]),
        node("Add", ["scores", "mask"], ["masked"]),
        node("Softmax", ["masked"], ["shares"], axis=-1),
        node("MatMul", ["shares", "v"], ["seen"]),
        node("Add", ["x", "seen"], ["h"]),
        *(more or [node("Identity", ["h"], ["hidden"])]),
        node("MatMul", ["hidden", "head"], ["output"]),
    ]
    tensors = {name: rng.normal(size=shape).astype(np.float32) for name, shape in weights.items()}
    tensors |= {
        "mask": mask,
        "axis": np.array([1]),
        "one": np.array([1]),
        "zero": np.array([0]),
        "last": np.array([WINDOW - 1]),
        "end": np.array([WINDOW]),
        "flat": np.array([-1, WINDOW * WIDTH]),
        "kernel": rng.normal(size=(WINDOW, WINDOW, 1)).astype(np.float32),
    }
    graph = helper.make_graph(
        nodes,
        "attention",
        [helper.make_tensor_value_info("input", TensorProto.INT64, ["batch", WINDOW])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, ["batch", None, TOKENS])],
        [numpy_helper.from_array(each, name) for name, each in tensors.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    return bytes(model.SerializeToString())


def golden(onnx: bytes, count: int = 4) -> tuple[Any, Any]:
    """Random tokens, and the logits of a model for them, one sequence at a time."""
    inputs = np.random.default_rng(1).integers(TOKENS, size=(count, WINDOW))
    session = onnxruntime.InferenceSession(onnx, providers=["CPUExecutionProvider"])
    return inputs, np.concatenate([session.run(None, {"input": row[None]})[0] for row in inputs])
