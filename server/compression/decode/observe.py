"""Static facts of a graph for one input: shapes of all tensors, and integers that are shapes."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from server.compression.decode.errors import NotDecodable

SHAPE_OF = frozenset({"Shape", "Size"})
"""Operators whose outputs depend on the shape of their input alone."""
RECURRENT = frozenset({"GRU", "LSTM", "RNN"})
_PROBE = "decode/shape/"


@dataclass(frozen=True)
class ObservedGraph:
    """A graph, run once on one sequence of tokens."""

    nodes: tuple[onnx.NodeProto, ...]
    """Those that the output depends on, in the order in which they run."""
    shapes: Mapping[str, tuple[int, ...]]
    values: Mapping[str, NDArray[Any]]
    """Arguments of operators that don't depend on the tokens."""
    types: Mapping[str, int]
    """Types of elements, as ONNX numbers them; of all tensors whose type it can infer."""
    varying: frozenset[str]
    """Tensors that depend on the tokens, and not just on how many there are."""

    def attributes(self, node: onnx.NodeProto) -> dict[str, Any]:
        """Returns the attributes of a node."""
        return {each.name: helper.get_attribute_value(each) for each in node.attribute}


def observe(model: onnx.ModelProto, window: int) -> ObservedGraph:
    """Runs a model of one input ``(B, window)`` on one sequence, and looks at its tensors.

    Raises:
        NotDecodable: onnxruntime cannot run it.
    """
    fixed = copy.deepcopy(model)
    graph = fixed.graph
    dims = graph.input[0].type.tensor_type.shape.dim
    for dim, size in zip(dims, (1, window), strict=True):
        dim.dim_value = size
    for output in graph.output:
        output.type.tensor_type.ClearField("shape")
    nodes = live(graph.node, [each.name for each in graph.output])
    given = graph.input[0].name
    varying = _varying(nodes, given)
    constant = {each.name: numpy_helper.to_array(each) for each in graph.initializer}
    arguments = [
        name
        for name in dict.fromkeys(name for node in nodes for name in _arguments(node))
        if name and name not in varying and name not in constant
    ]
    named = [name for node in nodes for name in node.output if name]
    types = _types(fixed)
    probes = [helper.make_node("Shape", [name], [_PROBE + name]) for name in named]
    del graph.node[:], graph.output[:]
    graph.node.extend([*nodes, *probes])
    wanted = [*arguments, *(_PROBE + name for name in named)]
    graph.output.extend(helper.make_empty_tensor_value_info(name) for name in wanted)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    try:
        session = onnxruntime.InferenceSession(
            fixed.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        tokens = np.zeros((1, window), helper.tensor_dtype_to_np_dtype(types[given]))
        found = dict(zip(wanted, session.run(wanted, {given: tokens}), strict=True))
    except Exception as error:  # onnxruntime's errors have no common base class
        raise NotDecodable(f"it does not run on one sequence: {error}") from error
    shapes = {name: tuple(map(int, found[_PROBE + name])) for name in named}
    shapes |= {name: array.shape for name, array in constant.items()}
    return ObservedGraph(
        nodes=tuple(nodes),
        shapes={**shapes, given: (1, window)},
        values={**{name: found[name] for name in arguments}, **constant},
        types=types,
        varying=varying,
    )


def live(nodes: Any, outputs: list[str]) -> list[onnx.NodeProto]:
    """Returns the nodes that outputs depend on, in their order."""
    needed, kept = set(outputs), []
    for node in reversed(list(nodes)):
        if needed.intersection(node.output):
            needed.update(name for name in node.input if name)
            kept.append(node)
    return kept[::-1]


def _varying(nodes: list[onnx.NodeProto], given: str) -> frozenset[str]:
    found = {given}
    for node in nodes:
        if node.op_type not in SHAPE_OF and found.intersection(node.input):
            found.update(name for name in node.output if name)
    return frozenset(found)


def _arguments(node: onnx.NodeProto) -> list[str]:
    """Returns the inputs of a node whose values may decide what becomes of positions."""
    if node.op_type in SHAPE_OF:
        return list(node.output)
    if node.op_type in RECURRENT:
        return list(node.input[4:7])
    return list(node.input[1:])


def _types(model: onnx.ModelProto) -> dict[str, int]:
    graph = onnx.shape_inference.infer_shapes(model).graph
    found = {each.name: each.data_type for each in graph.initializer}
    for each in (*graph.input, *graph.value_info, *graph.output):
        if elem := each.type.tensor_type.elem_type:
            found[each.name] = elem
    return found
