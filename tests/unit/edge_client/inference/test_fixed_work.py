from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edge_client.inference.fixed_work import why_unbounded
from edge_client.inference.row_wise import why_coupled
from tests import hostile_models as hostile


def model(nodes: Any, **tensors: Any) -> onnx.ModelProto:
    graph = helper.make_graph(
        list(nodes),
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in tensors.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=8)


def why(*nodes: Any, **tensors: Any) -> str:
    return why_unbounded(model(nodes, **tensors).SerializeToString())


node = helper.make_node


def test_shapes_of_shapes_and_constants_are_fixed_work() -> None:
    assert why(node("MatMul", ["x", "w"], ["y"]), w=np.eye(3, dtype=np.float32)) == ""
    assert why(node("Relu", ["x"], ["a"]), node("Softmax", ["a"], ["y"])) == ""
    # x.reshape(len(x), -1): the batch's size may be anything
    assert (
        why(
            node("Shape", ["x"], ["s"], start=0, end=1),
            node("Concat", ["s", "rest"], ["to"], axis=0),
            node("Reshape", ["x", "to"], ["y"]),
            rest=np.array([-1]),
        )
        == ""
    )
    assert why(node("Constant", [], ["k"], value_int=3), node("Add", ["x", "k"], ["y"])) == ""
    assert why(node("Clip", ["x", "", "most"], ["y"]), most=np.float32(1)) == ""


@pytest.mark.parametrize(
    ("shaped", "inputs"),
    [
        ("Expand", ["x", "n"]),
        ("Reshape", ["x", "n"]),
        ("Tile", ["x", "n"]),
        ("ConstantOfShape", ["n"]),
        ("Range", ["zero", "n", "one"]),
        ("OneHot", ["x", "n", "x"]),
        ("TopK", ["x", "n"]),
        ("Slice", ["x", "zero", "n"]),
        ("Pad", ["x", "n"]),
        ("Resize", ["x", "", "", "n"]),
        ("Split", ["x", "n"]),
        ("Unsqueeze", ["x", "n"]),
        ("ReduceSum", ["x", "n"]),
    ],
)
def test_a_shape_from_an_inputs_numbers_is_not(shaped: str, inputs: list[str]) -> None:
    cast = node("Cast", ["x"], ["n"], to=TensorProto.INT64)
    constants = {"zero": np.array([0]), "one": np.array([1])}
    said = why(cast, node(shaped, inputs, ["y"]), **constants)
    assert said == f"{shaped} takes a shape from the numbers of an input"
    # Through any number of operators, and mixed with constants.
    more = [cast, node("Mul", ["n", "zero"], ["a"]), node("Add", ["a", "one"], ["b"])]
    through = [("b" if name == "n" else name) for name in inputs]
    assert why(*more, node(shaped, through, ["y"]), **constants) == said


@pytest.mark.parametrize(
    "operator",
    [
        *("NonZero", "Unique", "Compress", "NonMaxSuppression", "Loop", "Scan", "If", "Optional"),
        *("RandomNormal", "SequenceAt", "StringSplit", "Multinomial", "NoSuchOperator"),
    ],
)
def test_operators_that_count_or_loop_or_are_not_known_are_not(operator: str) -> None:
    assert why(node(operator, ["x"], ["y"])).startswith(f"the work of {operator} may depend")


def test_an_operator_that_some_numbers_trap_is_for_constants_alone() -> None:
    # int32: -2**31 modulo -1 is a signal, which ends the process that runs the model.
    cast, back = node("Cast", ["x"], ["n"], to=TensorProto.INT32), node("Identity", ["r"], ["y"])
    least = np.int32(-1)
    said = "Mod ends the process for some numbers of an input"
    assert why(cast, node("Mod", ["n", "k"], ["r"]), back, k=least) == said
    assert why(cast, node("Mod", ["k", "n"], ["r"]), back, k=least) == said
    assert why(node("Shape", ["x"], ["n"]), node("Mod", ["n", "k"], ["y"]), k=np.array([2])) == ""


def test_operators_of_other_domains_are_not_those_of_the_same_name() -> None:
    assert "the work of evil:Relu" in why(node("Relu", ["x"], ["y"], domain="evil"))
    assert why(node("Relu", ["x"], ["y"], domain="ai.onnx")) == ""
    assert why(node("QGemm", ["x"], ["y"], domain="com.microsoft")) == ""
    assert "com.microsoft:EPContext" in why(node("EPContext", ["x"], ["y"], domain="com.microsoft"))


def test_whole_numbers_are_not_divided_in_process() -> None:
    # The least int64 by -1 ends the process, and a caller chooses the -1.
    least = np.array([-(2**63)])
    to = node("Cast", ["x"], ["i"], to=TensorProto.INT64)
    assert "Div ends the process" in why(to, node("Div", ["least", "i"], ["y"]), least=least)
    assert "Div ends" in why(to, node("Abs", ["i"], ["a"]), node("Div", ["a", "i"], ["y"]))
    fifth = np.float32(5)
    assert why(node("Sub", ["x", "f"], ["a"]), node("Div", ["f", "a"], ["y"]), f=fifth) == ""
    assert why(node("Exp", ["x"], ["a"]), node("Div", ["a", "a"], ["y"])) == ""
    back = node("Cast", ["i"], ["f"], to=TensorProto.FLOAT)
    assert why(to, back, node("Div", ["f", "f"], ["y"])) == ""
    halves = node("Constant", [], ["k"], value_float=0.5)
    assert why(to, halves, back, node("Div", ["f", "k"], ["y"])) == ""
    whole = node("Constant", [], ["k"], value_int=-1)
    assert "Div ends" in why(to, whole, node("Div", ["i", "k"], ["y"]))
    assert why(node("Shape", ["x"], ["s"]), whole, node("Div", ["s", "k"], ["y"])) == ""


def test_names_that_two_readers_could_take_differently_are_refused() -> None:
    assert "before it is computed" in why(node("Relu", ["later"], ["y"]))
    assert "two operators compute 'a'" in why(node("Relu", ["x"], ["a"]), node("Abs", ["x"], ["a"]))
    assert "two operators compute 'w'" in why(node("Relu", ["x"], ["w"]), w=np.zeros(1))


def test_everything_that_is_no_plain_graph_is_refused() -> None:
    plain = model([node("Relu", ["x"], ["y"])])
    raw = plain.SerializeToString()
    assert why_unbounded(raw) == ""
    assert "2 graphs" in why_unbounded(raw + raw)  # protobuf would merge them
    assert "own format" in why_unbounded(raw[:4] + b"ORTM" + raw[8:])
    assert "in another file" in why_unbounded(hostile.reads_a_file("/etc/hostname", 4))
    assert "a graph" in why_unbounded(hostile.endless_loop())

    functions = onnx.ModelProto.FromString(raw)
    functions.functions.add(name="f")
    assert "functions" in why_unbounded(functions.SerializeToString())

    sparse = onnx.ModelProto.FromString(raw)
    sparse.graph.sparse_initializer.add()
    assert "sparse" in why_unbounded(sparse.SerializeToString())

    overload = onnx.ModelProto.FromString(raw)
    overload.graph.node[0].overload = "other"
    assert "overload" in why_unbounded(overload.SerializeToString())

    hidden = model([node("Constant", [], ["k"], value=TensorProto(data_type=1, dims=[2]))])
    tensor = hidden.graph.node[0].attribute[0].t
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="/etc/hostname")
    assert "in another file" in why_unbounded(hidden.SerializeToString())


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"garbage",
        b"\x3a\x05abc",  # a graph of 5 bytes in a file of 3
        b"\x3b",  # a group
        b"\x00\x01",  # field 0
        b"\x3a" + b"\xff" * 11,  # a length without end
        b"\x38\x01",  # a graph that is a number
        b"\xfa\x7f\x00",  # an unknown field
        b"\x3a\x06\x0a\x04\x22\x02\xff\xff",  # an operator that is not UTF-8
        b"\x3a\x08\x0a\x06\x22\x01a\x22\x01b",  # an operator given twice
    ],
)
def test_what_is_no_onnx_file_is_refused(raw: bytes) -> None:
    assert why_unbounded(raw)
    assert why_coupled(raw, (3,))
