"""Vectors in the intermediate code of compiled loops, where numba's own come out too short.

A loop of numba's becomes one of vectors only when nothing it writes may lie where it reads, which
is asked again each time that a short loop begins. Here the loop's body is written down instead.
Widths that a processor lacks are taken in parts by LLVM.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.core import cgutils
from numba.extending import intrinsic

FLOAT, BYTE, SHORT, INT = ir.FloatType(), ir.IntType(8), ir.IntType(32), ir.IntType(64)
_ALIGNED = {FLOAT: 4, BYTE: 1, SHORT: 4, INT: 8}
_FREE = ("contract",)  # a product and a sum may be rounded once

Builder = Any
Value = Any

memory: Any = cgutils.alloca_once_value
"""Takes a builder and a value: where sums are kept that grow in a loop, in a register if there is
one left."""
counted: Any = cgutils.for_range
"""Takes a builder and a number: a context that holds a loop's body, and gives it its ``index``."""


def written(writer: Callable[..., Any]) -> Any:
    """A decorator of what writes down a function that compiled loops may call.

    Numbers that are known as those are compiled come to it as such.
    """
    return intrinsic(prefer_literal=True)(writer)


def lanes_of(numbers: int) -> int:
    """Lanes of the longest vectors that so many numbers fill; 0 where no length does."""
    return next((lanes for lanes in (16, 8) if numbers % lanes == 0), 0)


def known(value: int) -> Value:
    """A place or a distance that is known."""
    return INT(value)


def every(kind: ir.Type, value: float, lanes: int) -> Value:
    """A vector of one constant."""
    return ir.Constant(ir.VectorType(kind, lanes), [value] * lanes)


def spread(builder: Builder, value: Value, lanes: int) -> Value:
    """A vector of one number."""
    of = ir.VectorType(value.type, lanes)
    first = builder.insert_element(ir.Constant(of, ir.Undefined), value, ir.IntType(32)(0))
    places = ir.Constant(ir.VectorType(ir.IntType(32), lanes), [0] * lanes)
    return builder.shuffle_vector(first, ir.Constant(of, ir.Undefined), places)


def _pointer(builder: Builder, kind: ir.Type, address: Value, at: Value) -> Value:
    return builder.gep(builder.inttoptr(address, kind.as_pointer()), [at])


def load(builder: Builder, kind: ir.Type, address: Value, at: Value, lanes: int = 0) -> Value:
    """Numbers from place ``at`` behind an address, as a vector; without lanes, one number."""
    pointer = _pointer(builder, kind, address, at)
    if lanes:
        pointer = builder.bitcast(pointer, ir.VectorType(kind, lanes).as_pointer())
    return builder.load(pointer, align=_ALIGNED[kind])


def store(builder: Builder, kind: ir.Type, value: Value, address: Value, at: Value) -> None:
    """Writes a vector from place ``at`` behind an address on."""
    pointer = builder.bitcast(_pointer(builder, kind, address, at), value.type.as_pointer())
    builder.store(value, pointer, align=_ALIGNED[kind])


def multiplied(builder: Builder, one: Value, other: Value) -> Value:
    """Their product, which `added` may round together with its sum."""
    return builder.fmul(one, other, flags=_FREE)


def added(builder: Builder, one: Value, other: Value) -> Value:
    """Their sum."""
    return builder.fadd(one, other, flags=_FREE)
