"""Decides whether the rows of a batch stay apart in a model, whatever they hold.

A trial on some inputs cannot show that: a file may let rows meet only where one of them holds a
certain number. So each operator is followed by what it does with the first dimension, and one that
is not known (`edge_client.inference.row_operators`) counts as coupling.
"""

from __future__ import annotations

from collections.abc import Sequence

from edge_client.inference.graph import PlainGraph, UnreadableGraph, read_graph
from edge_client.inference.row_operators import follow
from edge_client.inference.row_values import Coupled, FixedTensor, RowTensor, Value

_LEAST_OPSET = 13
"""Before it, Softmax and others took their axes in other ways."""


def why_coupled(onnx: bytes, row_shape: Sequence[int]) -> str:
    """Returns why the rows of a batch may affect each other; empty if they do not.

    Guarantee:
        If the result is empty, each row of each output depends on the same row of the input alone,
        for all inputs, except for rounding. (An operator that fails, fails for the whole batch.)

    Args:
        onnx: The content of an ONNX file, from anybody.
        row_shape: Shape of the only input, without the batch dimension.

    Returns:
        One clause, for people; or an empty text.
    """
    try:
        graph = read_graph(onnx)
        if graph.opset < _LEAST_OPSET:
            return f"it is of operator set {graph.opset}, expected {_LEAST_OPSET} or later"
        return _follow(graph, tuple(row_shape))
    except (UnreadableGraph, Coupled) as error:
        return str(error)


def _follow(graph: PlainGraph, row_shape: tuple[int, ...]) -> str:
    if len(graph.inputs) != 1:
        return "it has several inputs"
    values: dict[str, Value] = {
        name: FixedTensor(one.shape, one.numbers) for name, one in graph.initializers.items()
    }
    values[graph.inputs[0]] = RowTensor(row_shape)
    for node in graph.nodes:
        if any(name and name not in values for name in node.inputs):
            return f"{node.operator} takes a tensor before it is computed"
        given = [values[name] if name else None for name in node.inputs]
        try:
            found = follow(node, given)
        except (Coupled, LookupError, TypeError, ValueError, ArithmeticError):
            return f"{node.operator} may let one row affect another"
        for name, value in zip(node.outputs, found, strict=False):
            values[name] = value
        if any(node.outputs[len(found) :]):
            return f"{node.operator} has more outputs than are known here"
    if all(isinstance(values.get(name), RowTensor) for name in graph.outputs):
        return ""
    return "an output has no row for each of the input"
