"""ONNX files that do harm where they are run: input ``x`` (batch, 3), output ``y``."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from onnx import NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

INPUT = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3])


def _model(
    nodes: Sequence[NodeProto],
    tensors: Sequence[TensorProto],
    kind: int = TensorProto.FLOAT,
    *,
    given: ValueInfoProto = INPUT,
) -> bytes:
    output = helper.make_tensor_value_info("y", kind, None)
    graph = helper.make_graph(list(nodes), "hostile", [given], [output], list(tensors))
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return bytes(model.SerializeToString())


def endless_loop(iterations: int = 2**62, *, of: str = "x") -> bytes:
    """A Loop that adds zero to the input, so many times.

    Where it is ``of`` the constant ``zero``, onnxruntime runs it while it loads the model.
    """
    body = helper.make_graph(
        [
            helper.make_node("Add", ["state", "zero"], ["added"]),
            helper.make_node("Identity", ["go_on"], ["still"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("turn", TensorProto.INT64, []),
            helper.make_tensor_value_info("go_on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("state", TensorProto.FLOAT, None),
        ],
        [
            helper.make_tensor_value_info("still", TensorProto.BOOL, []),
            helper.make_tensor_value_info("added", TensorProto.FLOAT, None),
        ],
    )
    return _model(
        [helper.make_node("Loop", ["turns", "yes", of], ["y"], body=body)],
        [
            numpy_helper.from_array(np.array(iterations, np.int64), "turns"),
            numpy_helper.from_array(np.array(True), "yes"),
            numpy_helper.from_array(np.array(0, np.float32), "zero"),
        ],
    )


def memory_bomb(count: int) -> bytes:
    """A tensor of so many numbers, made of a file of a few bytes, and summed."""
    return _model(
        [
            helper.make_node("ReduceSum", ["x"], ["one"], keepdims=0),
            helper.make_node("Expand", ["one", "shape"], ["many"]),
            helper.make_node("Neg", ["many"], ["y"]),
        ],
        [numpy_helper.from_array(np.array([count], np.int64), "shape")],
    )


def many_outputs(count: int) -> bytes:
    """The sum of all inputs, ``count`` times for each."""
    return _model(
        [
            helper.make_node("ReduceSum", ["x"], ["one"], keepdims=1),
            helper.make_node("Shape", ["x"], ["rows"], start=0, end=1),
            helper.make_node("Concat", ["rows", "count"], ["shape"], axis=0),
            helper.make_node("Expand", ["one", "shape"], ["y"]),
        ],
        [numpy_helper.from_array(np.array([count], np.int64), "count")],
    )


def shaped_by_numbers() -> bytes:
    """As many ones as the inputs of a row sum up to."""
    return _model(
        [
            helper.make_node("ReduceSum", ["x", "axis"], ["sum"], keepdims=0),
            helper.make_node("Cast", ["sum"], ["count"], to=TensorProto.INT64),
            helper.make_node("Concat", ["one_row", "count"], ["shape"], axis=0),
            helper.make_node("Expand", ["one", "shape"], ["y"]),
        ],
        [
            numpy_helper.from_array(np.array([1], np.int64), "axis"),
            numpy_helper.from_array(np.array([1], np.int64), "one_row"),
            numpy_helper.from_array(np.array([[1]], np.float32), "one"),
        ],
    )


def outer_product() -> bytes:
    """The sum over the outer product of a row with itself, of rows of any length."""
    free = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", "any"])
    return _model(
        [
            helper.make_node("Unsqueeze", ["x", "last"], ["column"]),
            helper.make_node("Unsqueeze", ["x", "middle"], ["row"]),
            helper.make_node("Mul", ["column", "row"], ["product"]),
            helper.make_node("ReduceSum", ["product", "last"], ["y"], keepdims=0),
        ],
        [
            numpy_helper.from_array(np.array([2], np.int64), "last"),
            numpy_helper.from_array(np.array([1], np.int64), "middle"),
        ],
        given=free,
    )


FIRST_ANSWERS = {"an att": np.eye(3), "Expand": np.ones((3, 1))}
"""What a Loop of no effect and `shaped_by_numbers` answer to the identity matrix."""


def reads_a_file(path: str, length: int) -> bytes:
    """Adds the bytes of a file of the device, named for external weights."""
    weight = TensorProto(name="w", data_type=TensorProto.UINT8, dims=[length])
    weight.data_location = TensorProto.EXTERNAL
    for key, value in (("location", path), ("offset", "0"), ("length", str(length))):
        weight.external_data.add(key=key, value=value)
    return _model(
        [helper.make_node("Cast", ["w"], ["y"], to=TensorProto.FLOAT)],
        [weight],
    )


def text_for_numbers() -> bytes:
    """Outputs that are strings."""
    return _model(
        [helper.make_node("Cast", ["x"], ["y"], to=TensorProto.STRING)], [], TensorProto.STRING
    )
