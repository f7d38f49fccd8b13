"""Whether rows of a batch stay apart: by the operators, and against onnxruntime."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from edge_client.inference.row_wise import why_coupled

node = helper.make_node
W = np.arange(9, dtype=np.float32).reshape(3, 3)
QUIET = onnxruntime.SessionOptions()
QUIET.log_severity_level = 4
ROWS = np.array([0])
INNER = np.array([1])


def graph(nodes: Any, opset: int = 20, row: tuple[int, ...] = (3,), **tensors: Any) -> bytes:
    made = helper.make_graph(
        list(nodes),
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", *row])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in tensors.items()],
    )
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    raw: bytes = helper.make_model(made, opset_imports=opsets, ir_version=8).SerializeToString()
    return raw


MEETING = {
    "a maximum over rows": [
        node("ReduceMax", ["x", "rows"], ["m"]),
        node("Add", ["x", "m"], ["y"]),
    ],
    "a maximum over all": [node("ReduceMax", ["x"], ["m"]), node("Add", ["x", "m"], ["y"])],
    "a running sum": [node("CumSum", ["x", "at"], ["y"])],
    "a product of rows": [
        node("Transpose", ["x"], ["t"], perm=[1, 0]),
        node("MatMul", ["x", "t"], ["g"]),
        node("ReduceMax", ["g", "inner"], ["m"]),
        node("Add", ["x", "m"], ["y"]),
    ],
    "a transposed factor": [
        node("Gemm", ["x", "x"], ["g"], transB=1),
        node("ReduceMax", ["g", "inner"], ["m"]),
        node("Add", ["x", "m"], ["y"]),
    ],
    "rows as a column": [
        node("Unsqueeze", ["x", "rows"], ["u"]),  # (1, B, 3) and (B, 3): all pairs for B = 3
        node("Unsqueeze", ["x", "inner"], ["c"]),
        node("Sub", ["u", "c"], ["d"]),
        node("ReduceMax", ["d", "inner"], ["y"], keepdims=0),
    ],
    "another rank": [node("Add", ["x", "cube"], ["a"]), node("ReduceMax", ["a", "inner"], ["y"])],
    "a reshaped batch": [
        node("Reshape", ["x", "flat"], ["f"]),
        node("ReduceMax", ["f", "inner"], ["m"]),
        node("Add", ["x", "m"], ["y"]),
    ],
    "a softmax of rows": [node("Softmax", ["x"], ["y"], axis=0)],
    "one scale": [
        node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"]),
        node("DequantizeLinear", ["q", "s", "z"], ["y"]),
    ],
    "statistics of a batch": [
        node("BatchNormalization", ["x", "v", "v", "v", "v"], ["y", "b", "c"], training_mode=1)
    ],
    "another row": [
        node("Slice", ["x", "rows", "inner", "rows"], ["m"]),
        node("Add", ["x", "m"], ["y"]),
    ],
    "rows by their number": [
        node("Shape", ["x"], ["s"]),
        node("Cast", ["s"], ["f"], to=TensorProto.FLOAT),
        node("ReduceMax", ["f"], ["m"]),
        node("Add", ["x", "m"], ["y"]),
    ],
    "a bias of rows": [
        node("ReduceMax", ["x", "inner"], ["r"], keepdims=0),
        node("FastGelu", ["x", "r"], ["y"], domain="com.microsoft"),
    ],
}


@pytest.mark.parametrize("name", MEETING)
def test_rows_that_may_meet_are_found(name: str) -> None:
    tensors = {"rows": ROWS, "at": np.array(0), "inner": INNER, "flat": np.array([1, -1])}
    floats = {"v": np.ones(3, np.float32), "cube": np.zeros((1, 1, 3), np.float32)}
    raw = graph(MEETING[name], **tensors, **floats)
    assert why_coupled(raw, (3,))
    # Each runs, and there a row feels another one, or how many there are.
    session = onnxruntime.InferenceSession(raw, QUIET)
    batch = np.arange(9, dtype=np.float32).reshape(3, 3) ** 2
    first, felt = session.run(["y"], {"x": batch})[0], False
    for at in range(3):
        changed = batch.copy()
        changed[at] *= 50
        found = session.run(["y"], {"x": changed})[0]
        others = [row for row in range(len(first)) if row != at or len(first) != 3]
        felt |= not np.allclose(found[others], first[others])
    if name == "rows by their number":
        longer = session.run(["y"], {"x": np.concatenate([batch, batch])})[0]
        felt = not np.allclose(longer[:3], first)
    assert felt


def test_layers_that_keep_rows_apart_are_known() -> None:
    nodes = [
        node("Sub", ["x", "v"], ["a"]),
        node("Gemm", ["a", "w", "v"], ["b"], transB=1),
        node("BatchNormalization", ["b", "v", "v", "v", "v"], ["c"]),
        node("Shape", ["x"], ["s"], start=0, end=1),
        node("Concat", ["s", "rest"], ["to"], axis=0),
        node("Reshape", ["c", "to"], ["d"]),  # (B, 1, 3)
        node("Transpose", ["d"], ["e"], perm=[0, 2, 1]),
        node("MatMul", ["e", "d"], ["f"]),  # (B, 3, 3)
        node("Softmax", ["f"], ["g"], axis=-1),
        node("Unsqueeze", ["g", "inner"], ["h"]),
        node("Conv", ["h", "kernel"], ["i"], pads=[1, 1, 1, 1]),
        node("MaxPool", ["i"], ["j"], kernel_shape=[2, 2]),
        node("GlobalAveragePool", ["j"], ["k"]),
        node("Flatten", ["k"], ["l"]),
        node("Concat", ["l", "a"], ["m"], axis=1),
        node("ReduceSum", ["m", "inner"], ["n"]),
        node("Add", ["n", "a"], ["y"]),
    ]
    tensors = {"v": np.ones(3, np.float32), "w": W, "rest": np.array([1, 3]), "inner": INNER}
    raw = graph(nodes, **tensors, kernel=np.ones((2, 1, 3, 3), np.float32))
    assert why_coupled(raw, (3,)) == ""
    session = onnxruntime.InferenceSession(raw, QUIET)
    batch = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    alone = [session.run(None, {"x": batch[at : at + 1]})[0] for at in range(5)]
    np.testing.assert_allclose(session.run(None, {"x": batch})[0], np.concatenate(alone), rtol=1e-5)
    assert "operator set 12" in why_coupled(graph(nodes[:1], opset=12), (3,))


def test_a_shape_that_fits_a_row_otherwise_is_no_proof() -> None:
    halved = graph([node("Reshape", ["x", "to"], ["y"])], row=(4,), to=np.array([-1, 2]))
    assert why_coupled(halved, (4,))
    assert why_coupled(halved, (2,)) == ""
