"""What a device reads of an ONNX file is what onnx reads of it, or it is refused."""

from __future__ import annotations

from functools import cache

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from edge_client.inference.graph import UnreadableGraph, read_graph


@cache
def plain() -> bytes:
    """A file with each kind of field that the reader knows."""
    nodes = [
        helper.make_node("Shape", ["x"], ["s"], name="n", start=0, end=1, doc_string="d"),
        helper.make_node("Concat", ["s", "rest"], ["to"], axis=0),
        helper.make_node("Reshape", ["x", "to"], ["r"]),
        helper.make_node("QGemm", ["r", "w"], ["q"], domain="com.microsoft", alpha=1.5),
        helper.make_node("Constant", [], ["k"], value_floats=[1.0, 2.0]),
        helper.make_node("Add", ["q", "k"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [
            numpy_helper.from_array(np.array([-1]), "rest"),
            helper.make_tensor("w", TensorProto.FLOAT, [2, 1], [1.0, 2.0]),
        ],
    )
    return bytes(helper.make_model(graph).SerializeToString())


def same_as_onnx(raw: bytes) -> bool:
    """Whether the reader refused the file; fails if it understood what onnx does not."""
    try:
        graph = read_graph(raw)
    except UnreadableGraph:
        return False
    try:
        read = onnx.ModelProto.FromString(raw)
    except DecodeError:  # nor would onnxruntime load it
        return False
    assert not read.functions
    assert not read.graph.sparse_initializer
    assert [tuple(node.output) for node in read.graph.node] == [n.outputs for n in graph.nodes]
    assert [tuple(node.input) for node in read.graph.node] == [n.inputs for n in graph.nodes]
    for node, ours in zip(read.graph.node, graph.nodes, strict=True):
        domain = f"{node.domain}:" if node.domain not in ("", "ai.onnx") else ""
        assert domain + node.op_type == ours.operator
        assert not any(each.HasField("g") or each.graphs for each in node.attribute)
    assert {each.name for each in read.graph.initializer} == graph.initializers
    assert all(not each.external_data for each in read.graph.initializer)
    return True


def test_a_plain_file_is_read() -> None:
    assert same_as_onnx(plain())


@given(st.data())
def test_a_damaged_file_is_read_alike_or_refused(data: st.DataObject) -> None:
    raw = bytearray(plain())
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(raw) - 1))
        match data.draw(st.sampled_from(["change", "insert", "remove", "repeat"])):
            case "change":
                raw[place] = data.draw(st.integers(0, 255))
            case "insert":
                raw[place:place] = data.draw(st.binary(min_size=1, max_size=4))
            case "remove":
                del raw[place : place + data.draw(st.integers(1, 4))]
            case _:
                raw[place:place] = raw[place : place + data.draw(st.integers(1, 40))]
        if not raw:
            break
    same_as_onnx(bytes(raw))


@given(st.binary(max_size=60))
def test_any_bytes_are_read_alike_or_refused(raw: bytes) -> None:
    same_as_onnx(raw)
