"""What becomes of each operator of a model when only new positions are computed.

A rule adds the operator to the decode graph, for the new positions, and says which axes of its
outputs stand for positions. An operator without a rule, or one that a rule refuses, ends the
attempt. Rules may take more than is causal: what they make is compared with the model afterwards.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx

from fedcore.artifacts.decode import NEXT
from server.compression.decode.builder import Axes, Builder, refused

Rule = Callable[[Builder, onnx.NodeProto], None]
_MIXES = "mixes positions"


def _elementwise(to: Builder, node: onnx.NodeProto) -> None:
    rank = len(to.shape(node.output[0]))
    inputs, axes = to.aligned(node, node.input, rank)
    to.keep(node, inputs)
    to.axes[node.output[0]] = axes


def _quantised(to: Builder, node: onnx.NodeProto) -> None:
    """QuantizeLinear and DequantizeLinear: scales are those of the whole tensor, or of an axis."""
    name, scale = node.input[:2]
    axes, rank = to.axes.get(name), len(to.shape(name))
    along = to.seen.attributes(node).get("axis", 1) % max(rank, 1)
    sizes = to.shape(scale)
    if axes is None or (scale in to.axes and to.axes[scale] != Axes()):
        raise refused(node, "takes scales from single tokens")
    if len(sizes) > 1 or (math.prod(sizes) > 1 and along in (axes.query, axes.key)):
        raise refused(node, "has a scale for each position")
    to.keep(node)
    to.axes[node.output[0]] = axes


def _one_scale(to: Builder, node: onnx.NodeProto) -> None:
    """DynamicQuantizeLinear: the scale is that of the new positions, of the model's all of them."""
    to.keep(node)
    to.axes[node.output[0]] = to.axes[node.input[0]]
    to.axes |= dict.fromkeys(node.output[1:], Axes())


def _passed(to: Builder, node: onnx.NodeProto) -> None:
    to.emit("Identity", node.input[:1], node.output[0])
    to.axes[node.output[0]] = to.axes[node.input[0]]


def _product(to: Builder, node: onnx.NodeProto) -> None:
    """MatMul and MatMulInteger: positions may stand in rows, columns, or on the axis summed over.

    Where scores of queries and keys arise or are summed over keys, keys or values are cached.
    """
    names, rest = list(node.input[:2]), list(node.input[2:])
    ranks = [len(to.shape(name)) for name in names]
    if min(ranks) < 2 or any(to.axes.get(name, Axes()) != Axes() for name in rest if name):
        raise refused(node, _MIXES)
    # Counted from the end: rows are -2, columns -1.
    sides = [_from_end(to, name) for name in names]
    summed = [
        "query" if side.query == at else "key" if side.key == at else ""
        for side, at in zip(sides, (-1, -2), strict=True)
    ]
    if summed == ["query", "query"]:
        raise refused(node, "sums over positions")
    for one, other in ((0, 1), (1, 0)):
        if summed[one] != "query":
            continue
        if sides[one].key is not None:
            raise refused(node, "sums over positions")
        if summed[other] != "key":
            sides[other] = _as_scores(to, node, names, other)
        names[one] = to.complete(names[one])
        sides[one] = Axes()
    queries = {s.query for s, at in zip(sides, (-1, -2), strict=True) if s.query not in (None, at)}
    keys = {s.key for s, at in zip(sides, (-1, -2), strict=True) if s.key not in (None, at)}
    if not keys and sides[0].query == -2 and sides[1].query == -1:
        names[1] = to.complete(names[1])
        queries, keys = {-2}, {-1}
    if len(queries) > 1 or len(keys) > 1 or queries & keys:
        raise refused(node, "combines positions along several axes")
    query, key = min(queries, default=None), min(keys, default=None)
    for side, name in enumerate(names):  # constants of a batch of positions
        if name not in to.axes and query is not None and -ranks[side] <= query < -2:
            axis = query + ranks[side]
            if name in to.seen.shapes and to.shape(name)[axis] == to.window:
                names[side] = to.at_positions(name, axis)
    to.keep(node, [*names, *rest])
    rank = len(to.shape(node.output[0]))
    to.axes[node.output[0]] = Axes(
        None if query is None else query + rank, None if key is None else key + rank
    )


def _from_end(to: Builder, name: str) -> Axes:
    axes, rank = to.axes.get(name, Axes()), len(to.shape(name))
    return Axes(*(None if at is None else at - rank for at in (axes.query, axes.key)))


def _as_scores(to: Builder, node: onnx.NodeProto, names: list[str], side: int) -> Axes:
    """Takes a constant of T by T numbers for the weights with which positions are summed."""
    name, rows = names[side], -2 if side == 0 else -1
    if name in to.axes or to.shape(name)[-2:] != (to.window, to.window):
        raise refused(node, "sums over positions")
    names[side] = to.at_positions(name, len(to.shape(name)) + rows)
    return Axes(query=rows)


def _affine(to: Builder, node: onnx.NodeProto) -> None:
    """Gemm of a matrix whose rows are positions, and constants."""
    attributes, (name, *others) = to.seen.attributes(node), node.input
    axes = to.axes.get(name)
    if axes is None or attributes.get("transA") or any(other in to.axes for other in others):
        raise refused(node, _MIXES)
    if axes.key is not None or axes.query == 1:
        raise refused(node, "sums over positions")
    inputs = list(node.input)
    if len(inputs) > 2 and inputs[2] and axes.query == 0:
        sizes = to.shape(inputs[2])
        if len(sizes) == 2 and sizes[0] == to.window:
            inputs[2] = to.at_positions(inputs[2], 0)
    to.keep(node, inputs)
    to.axes[node.output[0]] = axes


def _reshaped(to: Builder, node: onnx.NodeProto) -> None:
    """Reshape, Flatten, Squeeze, Unsqueeze: positions must stay an axis of their own."""
    name, output = node.input[0], node.output[0]
    axes = to.axes.get(name)
    if axes is None:
        raise refused(node, "takes sizes from the tokens")
    before, after = to.shape(name), to.shape(output)
    moved = Axes(
        *(None if at is None else _moved(at, before, after) for at in (axes.query, axes.key))
    )
    if (moved.query is None) != (axes.query is None) or (moved.key is None) != (axes.key is None):
        raise refused(node, "merges positions with other axes")
    sizes = list(after)
    if moved.query is not None:
        sizes[moved.query] = -1
    to.emit("Reshape", [name, to.integers(sizes)], output)
    to.axes[output] = moved


def _moved(axis: int, before: tuple[int, ...], after: tuple[int, ...]) -> int | None:
    """Returns where an axis is after a change of shape; None if it is no axis any more."""
    outer = math.prod(before[:axis])
    for place, size in enumerate(after):
        if size == before[axis] and math.prod(after[:place]) == outer:
            return place
    return None


def _transposed(to: Builder, node: onnx.NodeProto) -> None:
    axes, rank = to.axes[node.input[0]], len(to.shape(node.input[0]))
    order = list(to.seen.attributes(node).get("perm", range(rank)[::-1]))
    to.keep(node)
    to.axes[node.output[0]] = Axes(
        *(None if at is None else order.index(at) for at in (axes.query, axes.key))
    )


def _expanded(to: Builder, node: onnx.NodeProto) -> None:
    name, output = node.input[0], node.output[0]
    if name not in to.axes:
        raise refused(node, "takes sizes from the tokens")
    sizes, axes = list(to.shape(output)), to.axes[name]
    more = len(sizes) - len(to.shape(name))
    moved = Axes(*(None if at is None else at + more for at in (axes.query, axes.key)))
    if moved.query is not None:
        sizes[moved.query] = 1  # keeps the size that is there
    to.emit("Expand", [name, to.integers(sizes)], output)
    to.axes[output] = moved


def _sliced(to: Builder, node: onnx.NodeProto) -> None:
    """Slice: of the positions, nothing but all."""
    name, output = node.input[0], node.output[0]
    if name not in to.axes:
        raise refused(node, "takes sizes from the tokens")
    axes, before, after = to.axes[name], to.shape(name), to.shape(output)
    starts, ends = to.value(node, 1) or [], to.value(node, 2) or []
    along = [at % len(before) for at in to.value(node, 3) or range(len(starts))]
    steps = to.value(node, 4) or [1] * len(starts)
    kept = []
    for place, at in enumerate(along):
        if at not in (axes.query, axes.key):
            kept.append((starts[place], ends[place], at, steps[place]))
        elif steps[place] != 1 or before[at] != after[at]:
            raise refused(node, "takes some of the positions")
    if kept:
        to.emit("Slice", [name, *map(to.integers, zip(*kept, strict=True))], output)
    else:
        to.emit("Identity", [name], output)
    to.axes[output] = axes


def _gathered(to: Builder, node: onnx.NodeProto) -> None:
    """Gather: an embedding of tokens, or parts of an axis that is not that of positions."""
    data, indices = node.input
    rank = len(to.shape(data))
    along = to.seen.attributes(node).get("axis", 0) % rank
    if data not in to.axes:
        axes = to.axes[indices]
        moved = Axes(*(None if at is None else at + along for at in (axes.query, axes.key)))
    elif indices not in to.axes:
        axes, more = to.axes[data], len(to.shape(indices)) - 1
        if along in (axes.query, axes.key):
            raise refused(node, "takes some of the positions")
        moved = Axes(
            *(
                None if at is None else at if at < along else at + more
                for at in (axes.query, axes.key)
            )
        )
    else:
        raise refused(node, "takes what other tokens select")
    to.keep(node)
    to.axes[node.output[0]] = moved


def _joined(to: Builder, node: onnx.NodeProto) -> None:
    rank = len(to.shape(node.output[0]))
    along = to.seen.attributes(node)["axis"] % rank
    inputs, axes = to.aligned(node, node.input, rank)
    if along in (axes.query, axes.key):
        raise refused(node, "puts positions beside others")
    to.keep(node, inputs)
    to.axes[node.output[0]] = axes


def _along(default: int, *, at: int | None = None) -> Rule:
    """Returns the rule of operators that work along one axis, which must not be that of positions.

    Along keys they may work: what stands there is complete, and later positions are masked.

    Args:
        default: The axis where none is given.
        at: The input that has the axis; None if an attribute has it.
    """

    def rule(to: Builder, node: onnx.NodeProto) -> None:
        axes, rank = to.axes.get(node.input[0]), len(to.shape(node.input[0]))
        given = to.seen.attributes(node).get("axis", default)
        along = (to.value(node, at) or [default])[0] if at is not None else given
        if axes is None or along % rank == axes.query:
            raise refused(node, _MIXES)
        to.keep(node)
        to.axes |= dict.fromkeys((name for name in node.output if name), axes)

    return rule


def _split(to: Builder, node: onnx.NodeProto) -> None:
    axes, rank = to.axes[node.input[0]], len(to.shape(node.input[0]))
    if to.seen.attributes(node).get("axis", 0) % rank in (axes.query, axes.key):
        raise refused(node, "takes some of the positions")
    to.keep(node)
    to.axes |= dict.fromkeys(node.output, axes)


def _normalised(to: Builder, node: onnx.NodeProto) -> None:
    """LayerNormalization and its like: over all axes from one on."""
    name, rank = node.input[0], len(to.shape(node.input[0]))
    axes = to.axes.get(name)
    first = to.seen.attributes(node).get("axis", -1) % rank
    if axes is None or any(other in to.axes for other in node.input[1:]):
        raise refused(node, _MIXES)
    if any(at is not None and at >= first for at in (axes.query, axes.key)):
        raise refused(node, _MIXES)
    if any(len(to.shape(other)) > rank - first for other in node.input[1:] if other):
        raise refused(node, "has weights for each position")
    to.keep(node)
    to.axes |= dict.fromkeys((each for each in node.output if each), axes)


def _reduced(to: Builder, node: onnx.NodeProto) -> None:
    """ReduceSum and its like, ArgMax, ArgMin: over axes that are not those of new positions."""
    name, attributes = node.input[0], to.seen.attributes(node)
    axes, rank = to.axes.get(name), len(to.shape(name))
    over: Any = to.value(node, 1)
    if over is None:
        over = attributes.get("axes", attributes.get("axis"))
    if node.op_type.startswith("Arg"):
        over = attributes.get("axis", 0)
    gone = {at % rank for at in np.atleast_1d([] if over is None else over).tolist()}
    if not gone and not attributes.get("noop_with_empty_axes"):
        gone = set(range(rank))
    if axes is None or axes.query in gone:
        raise refused(node, _MIXES)
    kept = {at: place for place, at in enumerate(at for at in range(rank) if at not in gone)}
    if attributes.get("keepdims", 1):
        kept = {at: at for at in kept}
    query = None if axes.query is None else kept[axes.query]
    to.keep(node)
    to.axes[node.output[0]] = Axes(query, None if axes.key is None else kept.get(axes.key))


def _recurrent(to: Builder, node: onnx.NodeProto) -> None:
    """GRU, LSTM, RNN: their last state is the cache."""
    attributes, inputs = to.seen.attributes(node), [*node.input, *([""] * 8)][:8]
    states = (5, 6) if node.op_type == "LSTM" else (5,)
    weights = [name for at, name in enumerate(inputs) if at and at not in states]
    direction = attributes.get("direction", b"forward")
    if to.axes.get(inputs[0]) != Axes(query=0) or attributes.get("layout", 0):
        raise refused(node, "runs along an axis that is not that of positions")
    if direction != b"forward":
        raise refused(node, "looks at later positions")
    if inputs[4] or any(name in to.axes for name in weights if name):
        raise refused(node, "takes lengths of sequences")
    outputs = [*node.output, *([""] * 3)][:3]
    for place, at in enumerate(states, 1):
        initial = to.seen.values.get(inputs[at]) if inputs[at] else np.zeros(1)
        if initial is None or np.any(initial):
            raise refused(node, "does not start from zeros")
        if outputs[place] and any(outputs[place] in other.input for other in to.seen.nodes):
            raise refused(node, "passes on the state after all positions")
        made = to.state((1, 1, attributes["hidden_size"]), inputs[0])
        inputs[at], outputs[place] = made.name, made.name + NEXT
    kept = onnx.NodeProto()
    kept.CopyFrom(node)
    del kept.input[:], kept.output[:]
    kept.input.extend(inputs[: 8 if node.op_type == "LSTM" else 6])
    kept.output.extend(outputs[: 1 + len(states)])
    to.nodes.append(kept)
    to.axes[node.output[0]] = Axes(query=0)


_ELEMENTWISE = (
    "Abs Add And BitwiseAnd BitwiseNot BitwiseOr BitwiseXor Cast CastLike Ceil Clip Cos Div Elu",
    "Equal Erf Exp Floor Gelu Greater GreaterOrEqual HardSigmoid HardSwish Identity IsInf IsNaN",
    "LeakyRelu Less LessOrEqual Log Max Mean Min Mish Mod Mul Neg Not Or PRelu Pow Reciprocal Relu",
    "Round Selu Sigmoid Sign Sin Softplus Softsign Sqrt Sub Sum Swish Tan Tanh ThresholdedRelu",
    "Where Xor com.microsoft:Gelu com.microsoft:FastGelu",
)
_REDUCED = "L1 L2 LogSum LogSumExp Max Mean Min Prod Sum SumSquare"
RULES: dict[str, Rule] = {
    **{name: _elementwise for names in _ELEMENTWISE for name in names.split()},
    **{f"Reduce{name}": _reduced for name in _REDUCED.split()},
    **dict.fromkeys(("ArgMax", "ArgMin"), _reduced),
    **dict.fromkeys(("MatMul", "MatMulInteger"), _product),
    **dict.fromkeys(("Reshape", "Flatten", "Squeeze", "Unsqueeze"), _reshaped),
    **dict.fromkeys(("QuantizeLinear", "DequantizeLinear"), _quantised),
    **dict.fromkeys(("GRU", "LSTM", "RNN"), _recurrent),
    **dict.fromkeys(("Softmax", "LogSoftmax", "TopK"), _along(-1)),
    **dict.fromkeys(
        ("LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization"), _normalised
    ),
    "Concat": _joined,
    "CumSum": _along(0, at=1),
    "Dropout": _passed,
    "DynamicQuantizeLinear": _one_scale,
    "Expand": _expanded,
    "Gather": _gathered,
    "Gemm": _affine,
    "Slice": _sliced,
    "Split": _split,
    "Transpose": _transposed,
}
"""The rules of operators; the domain stands before the name of those that are not ONNX's own."""
