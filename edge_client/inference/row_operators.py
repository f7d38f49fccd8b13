"""What operators of ONNX do with the rows of a batch: `follow` is the one entry.

A value is known by what it depends on and by its shape, never by its numbers, except for the few
whole numbers that make up shapes and axes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from edge_client.inference.graph import GraphNode
from edge_client.inference.row_values import (
    BATCH,
    EACH,
    TOGETHER,
    Coupled,
    FixedTensor,
    RowTensor,
    Value,
    constant,
    fixed_tensor,
    follow_fixed,
    known_numbers,
    known_shape,
    names,
    row_tensor,
    whole_number,
    whole_numbers,
)

_REDUCING = names(
    "ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd "
    "ReduceSum ReduceSumSquare"
)


def follow(node: GraphNode, given: list[Value | None]) -> list[Value]:
    """Returns the outputs of an operator, as far as they are known.

    Args:
        node: The operator.
        given: Its inputs; None for those that are left out.

    Raises:
        Coupled, LookupError, TypeError, ValueError, ArithmeticError: rows may meet, or what the
            operator does with them is not known here.
    """
    if node.operator == "Constant":
        return [constant(node)]
    present = [one for one in given if one is not None]
    counts = any(isinstance(one, FixedTensor) and one.counts_rows for one in present)
    if not any(isinstance(one, RowTensor) for one in present):
        found = replace(follow_fixed(node, given), counts_rows=counts)
        return [found] * max(len(node.outputs), 1)
    if counts and node.operator != "Reshape":
        raise Coupled("the number of rows")
    if node.operator in EACH and len(present) == 1:
        return [row_tensor(given[0])]
    if node.operator in TOGETHER:
        return [_broadcast(given)]
    if node.operator in _REDUCING:
        return [_reduced(node, given)]
    return [_RULES[node.operator](node, given)]


def _inner(axis: int, rank: int) -> int:
    """Returns an axis counted from the front; raises for that of rows."""
    at = axis + rank if axis < 0 else axis
    if not 1 <= at < rank:
        raise Coupled(f"axis {axis}")
    return at


def _broadcast(given: Sequence[Value | None]) -> RowTensor:
    """Follows broadcasting: the first dimension must be that of rows for all, or missing."""
    present = [one for one in given if one is not None]
    rank = max(one.rank for one in present if isinstance(one, RowTensor))
    shapes = []
    for one in present:
        if isinstance(one, RowTensor):
            shape = one.shape if one.rank == rank else None
        else:
            own = known_shape(one)
            shape = own if len(own) < rank else own[1:] if own[:1] == (1,) else None
        if shape is None or len(shape) >= rank:
            raise Coupled("tensors that line up in another way")
        shapes.append((1,) * (rank - 1 - len(shape)) + shape)
    found = []
    for sizes in zip(*shapes, strict=True):
        wide = {size for size in sizes if size != 1}
        if len(wide) > 1:
            raise Coupled("tensors that don't fit")
        found.append(wide.pop() if wide else 1)
    return RowTensor(tuple(found))


def _reduced(node: GraphNode, given: list[Value | None]) -> RowTensor:
    data = row_tensor(given[0])
    told = known_numbers(given[1]) if len(given) > 1 else whole_numbers(node, "axes", ())
    axes = {_inner(axis, data.rank) for axis in told}
    if not axes:  # all of them
        raise Coupled("all axes")
    keep = whole_number(node, "keepdims", 1)
    sizes = [1 if at in axes else size for at, size in enumerate(data.shape, 1)]
    return RowTensor(tuple(s for at, s in enumerate(sizes, 1) if keep or at not in axes))


def _gemm(node: GraphNode, given: list[Value | None]) -> RowTensor:
    data, weight = row_tensor(given[0]), known_shape(given[1])
    if data.rank != 2 or len(weight) != 2 or whole_number(node, "transA", 0):
        raise Coupled("a product over rows")
    found = RowTensor((weight[0 if whole_number(node, "transB", 0) else 1],))
    return _broadcast([found, *given[2:3]])


def _matmul(node: GraphNode, given: list[Value | None]) -> RowTensor:
    one, other = given[:2]
    if isinstance(one, RowTensor) and isinstance(other, RowTensor):
        if one.rank != other.rank or one.rank < 3:
            raise Coupled("a product of rows")
        outer = _broadcast([RowTensor(one.shape[:-2]), RowTensor(other.shape[:-2])])
        return RowTensor((*outer.shape, one.shape[-2], other.shape[-1]))
    if isinstance(one, RowTensor):
        weight = known_shape(other)
        if len(weight) != 2 or one.rank < 2:
            raise Coupled("a product that lines up in another way")
        return RowTensor((*one.shape[:-1], weight[1]))
    weight, data = known_shape(one), row_tensor(other)
    if len(weight) != 2 or data.rank < 3:
        raise Coupled("a product over rows")
    return RowTensor((*data.shape[:-2], weight[0], data.shape[-1]))


def _window(node: GraphNode, data: RowTensor, kernel: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the size of what a window that moves over an image gives."""
    if node.attributes.get("auto_pad", "NOTSET") != "NOTSET" or whole_number(node, "ceil_mode", 0):
        raise Coupled("padding that is not told")
    count = len(data.shape) - 1
    strides = whole_numbers(node, "strides", (1,) * count)
    dilations = whole_numbers(node, "dilations", (1,) * count)
    pads = whole_numbers(node, "pads", (0,) * 2 * count)
    if count < 1 or not len(kernel) == len(strides) == len(dilations) == len(pads) / 2 == count:
        raise Coupled("a window of another rank")
    return tuple(
        (size + pads[at] + pads[at + count] - dilations[at] * (kernel[at] - 1) - 1) // strides[at]
        + 1
        for at, size in enumerate(data.shape[1:])
    )


def _conv(node: GraphNode, given: list[Value | None]) -> RowTensor:
    data, weight = row_tensor(given[0]), known_shape(given[1])
    for bias in given[2:]:
        fixed_tensor(bias)
    return RowTensor((weight[0], *_window(node, data, weight[2:])))


def _pool(node: GraphNode, given: list[Value | None]) -> RowTensor:
    data = row_tensor(given[0])
    if node.operator.startswith("Global"):
        return RowTensor((data.shape[0], *(1 for _ in data.shape[1:])))
    kernel = whole_numbers(node, "kernel_shape", ())
    return RowTensor((data.shape[0], *_window(node, data, kernel)))


def _normalised(node: GraphNode, given: list[Value | None]) -> RowTensor:
    """Normalises over an axis and those after it, or over each channel of each row."""
    data = row_tensor(given[0])
    for one in given[1:]:
        if one is not None and len(known_shape(one)) >= data.rank:
            raise Coupled("scales for rows")
    if node.operator in _BY_AXIS:
        _inner(whole_number(node, "axis", -1), data.rank)
    elif data.rank < 3:
        raise Coupled("no channels")
    return data


def _flatten(node: GraphNode, given: list[Value | None]) -> RowTensor:
    data = row_tensor(given[0])
    if whole_number(node, "axis", 1) not in (1, 1 - data.rank):
        raise Coupled("rows that are joined")
    return RowTensor((math.prod(data.shape),))


def _reshape(node: GraphNode, given: list[Value | None]) -> RowTensor:
    data, to = row_tensor(given[0]), fixed_tensor(given[1]).numbers
    if not to or (0 in to and whole_number(node, "allowzero", 0)):
        raise Coupled("zeros as sizes")
    whole, first = math.prod(data.shape), to[0]
    rest = [data.shape[at] if size == 0 else size for at, size in enumerate(to[1:])]
    if first in (0, BATCH) and rest.count(-1) == 1:
        known = -math.prod(rest)
        rest[rest.index(-1)] = whole // known
    if first not in (0, -1, BATCH) or min(rest, default=1) < 1 or math.prod(rest) != whole:
        raise Coupled("rows that are divided or joined")
    return RowTensor(tuple(rest))


def _squeeze(node: GraphNode, given: list[Value | None]) -> RowTensor:
    data = row_tensor(given[0])
    axes = {_inner(axis, data.rank) for axis in known_numbers(given[1])}
    if any(data.shape[at - 1] != 1 for at in axes):
        raise Coupled("an axis that is not 1")
    return RowTensor(tuple(size for at, size in enumerate(data.shape, 1) if at not in axes))


def _unsqueeze(node: GraphNode, given: list[Value | None]) -> RowTensor:
    data, told = row_tensor(given[0]), known_numbers(given[1])
    rank = data.rank + len(told)
    axes, sizes = {_inner(axis, rank) for axis in told}, iter(data.shape)
    if len(axes) != len(told):
        raise Coupled("an axis twice")
    return RowTensor(tuple(1 if at in axes else next(sizes) for at in range(1, rank)))


def _transpose(node: GraphNode, given: list[Value | None]) -> RowTensor:
    data = row_tensor(given[0])
    order = whole_numbers(node, "perm", ())
    if sorted(order) != list(range(data.rank)) or order[0] != 0:
        raise Coupled("rows that are moved")
    return RowTensor(tuple(data.shape[at - 1] for at in order[1:]))


def _concat(node: GraphNode, given: list[Value | None]) -> RowTensor:
    parts = [row_tensor(one) for one in given]
    at = _inner(whole_number(node, "axis", 0), parts[0].rank) - 1
    sizes = list(parts[0].shape)
    sizes[at] = sum(one.shape[at] for one in parts)
    return RowTensor(tuple(sizes))


def _slice(node: GraphNode, given: list[Value | None]) -> RowTensor:
    data = row_tensor(given[0])
    sizes = list(data.shape)
    starts, ends, axes = (known_numbers(given[at]) for at in (1, 2, 3))
    steps = known_numbers(given[4]) if len(given) > 4 else (1,) * len(axes)
    if len(set(axes)) < len(axes):
        raise Coupled("an axis twice")
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        at = _inner(axis, data.rank) - 1
        sizes[at] = len(range(sizes[at])[start:end:step])
    return RowTensor(tuple(sizes))


def _gather(node: GraphNode, given: list[Value | None]) -> RowTensor:
    data, at = given[:2]
    if isinstance(data, RowTensor):
        axis = _inner(whole_number(node, "axis", 0), data.rank) - 1
        return RowTensor((*data.shape[:axis], *known_shape(at), *data.shape[axis + 1 :]))
    if whole_number(node, "axis", 0) != 0:
        raise Coupled("rows that are moved")
    return RowTensor((*row_tensor(at).shape, *known_shape(data)[1:]))


def _shape_of(node: GraphNode, given: list[Value | None]) -> FixedTensor:
    whole = (BATCH, *row_tensor(given[0]).shape)
    found = whole[whole_number(node, "start", 0) : whole_number(node, "end", len(whole))]
    return FixedTensor((len(found),), found, counts_rows=True)


def _scaled(node: GraphNode, given: list[Value | None]) -> RowTensor:
    """Scales by numbers of the file: quantisation, and normalisation by stored statistics."""
    if whole_number(node, "training_mode", 0) or not all(
        isinstance(one, FixedTensor | None) for one in given[1:]
    ):
        raise Coupled("statistics of a batch")
    return row_tensor(given[0])


_BY_AXIS = names("Hardmax LayerNormalization LogSoftmax LpNormalization RMSNormalization Softmax")
_RULES: dict[str, Callable[[GraphNode, list[Value | None]], Value]] = {
    "Gemm": _gemm,
    "MatMul": _matmul,
    "Conv": _conv,
    "Flatten": _flatten,
    "Reshape": _reshape,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Transpose": _transpose,
    "Concat": _concat,
    "Slice": _slice,
    "Gather": _gather,
    "Shape": _shape_of,
    **dict.fromkeys(("BatchNormalization", "DequantizeLinear", "QuantizeLinear"), _scaled),
    **dict.fromkeys(("AveragePool", "GlobalAveragePool", "GlobalMaxPool", "MaxPool"), _pool),
    **dict.fromkeys((*_BY_AXIS, "GroupNormalization", "InstanceNormalization"), _normalised),
}
