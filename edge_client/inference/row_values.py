"""Values in a graph by what they depend on, and what operators do with those that are fixed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from edge_client.inference.graph import GraphNode, StoredTensor

INT64 = 7
BATCH = 1 << 64
"""Stands for the number of rows in a computed shape; no number of a file is as large."""


def names(text: str) -> frozenset[str]:
    """Returns the words of a text as a set."""
    return frozenset(text.split())


EACH = names(
    "Abs Acos Acosh Asin Asinh Atan Atanh Cast Ceil Celu Cos Cosh Elu Erf Exp Floor Gelu "
    "HardSigmoid HardSwish Identity IsInf IsNaN LeakyRelu Log Mish Neg Not Reciprocal Relu Round "
    "Selu Shrink Sigmoid Sign Sin Sinh Softplus Softsign Sqrt Swish Tan Tanh ThresholdedRelu "
    "com.microsoft:FastGelu com.microsoft:Gelu"
)
"""Operators of one tensor that take each number by itself."""
TOGETHER = names(
    "Add And BitwiseAnd BitwiseOr BitwiseXor Div Equal Greater GreaterOrEqual Less LessOrEqual Max "
    "Mean Min Mul Or PRelu Pow Sub Sum Where Xor Clip"
)
"""Operators that take the numbers at one place of all their tensors, after broadcasting."""


@dataclass(frozen=True)
class RowTensor:
    """A tensor ``(B, *shape)`` whose row ``i`` depends on row ``i`` of the input alone."""

    shape: tuple[int, ...]

    @property
    def rank(self) -> int:
        return 1 + len(self.shape)


@dataclass(frozen=True)
class FixedTensor:
    """A tensor that depends on no number of the input, but may on the number of rows."""

    shape: tuple[int, ...] | None
    """None if it is not known."""
    numbers: tuple[int, ...] | None = None
    counts_rows: bool = False
    """Whether it may depend on the number of rows."""


Value = RowTensor | FixedTensor


class Coupled(ValueError):
    """Rows may affect each other; the message says where."""


def row_tensor(value: Value | None) -> RowTensor:
    """Returns a value that has rows; raises `Coupled` for another."""
    if not isinstance(value, RowTensor):
        raise Coupled("a tensor without rows")
    return value


def fixed_tensor(value: Value | None) -> FixedTensor:
    """Returns a value that depends on no number of the input; raises `Coupled` for another."""
    if not isinstance(value, FixedTensor):
        raise Coupled("numbers of the input where a constant is expected")
    return value


def known_shape(value: Value | None) -> tuple[int, ...]:
    """Returns the shape of a fixed value; raises `Coupled` where it is not known."""
    found = fixed_tensor(value).shape
    if found is None:
        raise Coupled("a shape that is not known")
    return found


def known_numbers(value: Value | None) -> tuple[int, ...]:
    """Returns the numbers of a fixed value; raises `Coupled` where they are not known."""
    found = fixed_tensor(value).numbers
    if found is None or BATCH in found:
        raise Coupled("numbers that are not known")
    return found


def constant(node: GraphNode) -> FixedTensor:
    """Returns the value of a ``Constant``."""
    value = next(iter(node.attributes.values()), None)
    if isinstance(value, StoredTensor):
        return FixedTensor(value.shape, value.numbers)
    if isinstance(value, int):
        return FixedTensor((), (value,))
    if isinstance(value, tuple):
        return FixedTensor((len(value),), value)
    return FixedTensor(() if set(node.attributes) == {"value_float"} else None)


def follow_fixed(node: GraphNode, given: list[Value | None]) -> FixedTensor:
    """Follows shapes and the few whole numbers that make up a shape; forgets all else."""
    first = fixed_tensor(given[0]) if given else FixedTensor(None)
    numbers = first.numbers
    if node.operator in EACH | {"DequantizeLinear", "QuantizeLinear"}:
        kept = node.operator == "Identity" or node.attributes.get("to") == INT64
        return FixedTensor(first.shape, numbers if kept else None)
    parts = [
        one.numbers for one in given if isinstance(one, FixedTensor) and one.numbers is not None
    ]
    if node.operator == "Concat" and len(parts) == len(given):
        joined = tuple(number for part in parts for number in part)
        return FixedTensor((len(joined),), joined)
    if node.operator == "Squeeze" and first.shape == (1,):
        return FixedTensor((), numbers)
    if node.operator == "Unsqueeze" and first.shape == () and len(known_numbers(given[1])) == 1:
        return FixedTensor((1,), numbers)
    if node.operator == "Gather" and numbers is not None and first.shape == (len(numbers),):
        at = fixed_tensor(given[1])
        if at.numbers is not None:
            return FixedTensor(at.shape, tuple(numbers[n] for n in at.numbers))
    # Weights that are stored in fewer bits.
    if node.operator in TOGETHER:
        shapes = [fixed_tensor(one).shape for one in given if one is not None]
        known = [shape for shape in shapes if shape is not None]
        return FixedTensor(np.broadcast_shapes(*known) if len(known) == len(shapes) else None)
    if node.operator == "Reshape":
        to = fixed_tensor(given[1]).numbers
        return FixedTensor(to if to and min(to) > 0 and BATCH not in to else None)
    if node.operator == "Transpose" and first.shape is not None:
        order = whole_numbers(node, "perm", tuple(reversed(range(len(first.shape)))))
        return FixedTensor(tuple(first.shape[at] for at in order))
    return FixedTensor(None)


def whole_number(node: GraphNode, name: str, default: int) -> int:
    value = node.attributes.get(name, default)
    if not isinstance(value, int):
        raise Coupled(f"{name} is no number")
    return value


def whole_numbers(node: GraphNode, name: str, default: tuple[int, ...]) -> tuple[int, ...]:
    value = node.attributes.get(name, default)
    if not isinstance(value, tuple):
        raise Coupled(f"{name} is no list of numbers")
    return value
