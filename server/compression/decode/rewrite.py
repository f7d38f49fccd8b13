"""Turns the graph of a model over all positions into one of new positions and caches."""

from __future__ import annotations

import onnx
from onnx import TensorProto, helper

from fedcore.artifacts.decode import NEXT, POSITIONS
from server.compression.decode.builder import Axes, Builder, refused
from server.compression.decode.errors import NotDecodable
from server.compression.decode.observe import SHAPE_OF, live, observe
from server.compression.decode.rules import RULES

_NEW = "tokens"  # the name of the free dimension, of the new tokens


def decode_graph(model: onnx.ModelProto) -> onnx.GraphProto:
    """Returns the decode graph of a causal model, without the weights that it shares with it.

    Each tensor that depends on the tokens is followed from the input: which of its axes stand for
    positions, by the rules of the operators. In the decode graph this axis has the new positions
    alone. Where positions look at others, by scores or sums, the others come from a cache. Whether
    the model is causal is not looked at: the caller compares the graph with the model.

    Args:
        model: One input of tokens ``(B, T)``, one output of logits ``(B, T, V)``; opset 20.

    Returns:
        A graph of the form of `fedcore.artifacts.decode`.

    Raises:
        NotDecodable: an operator combines positions in a way that no cache can follow.
    """
    given = model.graph.input[0]
    window = _window(given)
    seen = observe(model, window)
    to = Builder(seen, window)
    to.axes[given.name] = Axes(query=1)
    output = model.graph.output[0]
    for node in seen.nodes:
        _follow(to, node)
    shape = seen.shapes[output.name]
    if to.axes.get(output.name) != Axes(query=1) or len(shape) != 3:
        raise NotDecodable("its output has no logits for each position")
    if not to.caches:
        raise NotDecodable("no position looks at another, so there is nothing to keep")
    info = helper.make_tensor_value_info
    outputs = [output.name, *(each.name + NEXT for each in to.caches)]
    nodes = live(to.nodes, outputs)
    used = {name for node in nodes for name in node.input}
    return helper.make_graph(
        nodes,
        "decode",
        [
            info(given.name, given.type.tensor_type.elem_type, (1, _NEW)),
            info(POSITIONS, TensorProto.INT64, (_NEW,)),
            *(info(each.name, each.type, each.shape) for each in to.caches),
        ],
        [
            info(output.name, output.type.tensor_type.elem_type, (1, _NEW, shape[2])),
            *(info(each.name + NEXT, each.type, each.shape) for each in to.caches),
        ],
        [each for each in to.constants if each.name in used],
    )


def _window(given: onnx.ValueInfoProto) -> int:
    dims = given.type.tensor_type.shape.dim
    if len(dims) != 2 or dims[1].dim_value < 2:
        raise NotDecodable("its input is no sequence of at least two tokens")
    return int(dims[1].dim_value)


def _follow(to: Builder, node: onnx.NodeProto) -> None:
    if any(name in to.seen.varying and name not in to.axes for name in node.input):
        raise refused(node, "takes what no rule has followed")
    if not any(name in to.axes for name in node.input):
        to.keep(node)
    elif node.op_type in SHAPE_OF:
        to.constant(node.output[0], to.seen.values[node.output[0]])
    else:
        domain = "" if node.domain in ("", "ai.onnx") else f"{node.domain}:"
        rule = RULES.get(f"{domain}{node.op_type}")
        if rule is None:
            raise refused(node, "may mix positions")
        rule(to, node)
