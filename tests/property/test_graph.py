"""What a device reads of an ONNX file is what onnx reads of it, or it is refused."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from edge_client.inference.graph import (
    Attribute,
    GraphNode,
    PlainGraph,
    StoredTensor,
    UnreadableGraph,
    read_graph,
)


@cache
def plain() -> bytes:
    """A file with each kind of field that the reader knows."""
    nodes = [
        helper.make_node("Shape", ["x"], ["s"], name="n", start=0, end=1, doc_string="d"),
        helper.make_node("Concat", ["s", "rest"], ["to"], axis=0),
        helper.make_node("Reshape", ["x", "to"], ["r"], perm=[0, -1, 2], pad="NOTSET"),
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


def read_by_us(raw: bytes) -> PlainGraph | None:
    """Returns what a device reads of a file; None if it refuses the file."""
    try:
        return read_graph(raw)
    except UnreadableGraph:
        return None


def read_by_onnx(raw: bytes) -> PlainGraph | None:
    """Returns what onnx reads of a file; None if the file has more than a plain graph."""
    model = onnx.ModelProto.FromString(raw)
    graph, nodes = model.graph, []
    for node in graph.node:
        if any(each.HasField("g") or each.graphs for each in node.attribute):
            return None
        domain = f"{node.domain}:" if node.domain not in ("", "ai.onnx") else ""
        attributes = {each.name: attribute(each) for each in node.attribute}
        operator = domain + node.op_type
        nodes.append(GraphNode(operator, tuple(node.input), tuple(node.output), attributes))
    stored = {each.name: tensor(each) for each in graph.initializer}
    own = [each.version for each in model.opset_import if each.domain in ("", "ai.onnx")]
    elsewhere = any(each.external_data for each in graph.initializer)
    if model.functions or graph.sparse_initializer or elsewhere:
        return None
    return PlainGraph(
        tuple(each.name for each in graph.input if each.name not in stored),
        tuple(each.name for each in graph.output),
        stored,
        tuple(nodes),
        {
            each.name: each.type.tensor_type.elem_type
            for each in graph.input
            if each.name not in stored
        },
        own[0] if len(own) == 1 else 0,
    )


def attribute(read: Any) -> Attribute:
    if read.HasField("t"):
        return tensor(read.t)
    if read.HasField("i"):
        return int(read.i)
    if read.HasField("s"):
        return bytes(read.s)[:1024].decode("utf-8", "replace")
    return tuple(read.ints) if 0 < len(read.ints) <= 64 else None


def tensor(read: Any) -> StoredTensor:
    size, numbers = math.prod(read.dims), list(read.int64_data)
    if read.HasField("raw_data") == bool(numbers) or read.data_type != 7 or size > 64:
        return StoredTensor(tuple(read.dims), read.data_type)
    if not numbers and len(read.raw_data) == 8 * size:
        numbers = np.frombuffer(read.raw_data, "<i8").tolist()
    known = tuple(numbers) if len(numbers) == size else None
    return StoredTensor(tuple(read.dims), read.data_type, known)


def refused_or_alike(raw: bytes) -> bool:
    """Whether a device refuses a file, or reads of it exactly what onnx does."""
    ours = read_by_us(raw)
    try:
        return ours is None or ours == read_by_onnx(raw)
    except DecodeError:  # nor would onnxruntime load it
        return True


def test_a_plain_file_is_read() -> None:
    assert read_by_us(plain()) == read_by_onnx(plain()) is not None


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
    assert refused_or_alike(bytes(raw))


@given(st.binary(max_size=60))
def test_any_bytes_are_read_alike_or_refused(raw: bytes) -> None:
    assert refused_or_alike(raw)
