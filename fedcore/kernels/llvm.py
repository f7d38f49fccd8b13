"""Explicit vector code for compiled loops, where numba's own vectorisation falls short.

numba vectorises a loop only if its writes cannot alias its reads, and tests this each time that a
short loop starts. Functions here emit the loop's LLVM code instead. LLVM splits vectors that are
wider than the processor's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.core import cgutils
from numba.extending import intrinsic

FLOAT, BYTE, SHORT, INT = ir.FloatType(), ir.IntType(8), ir.IntType(32), ir.IntType(64)
_ALIGNED = {FLOAT: 4, BYTE: 1, SHORT: 4, INT: 8}
_FREE = ("contract",)  # permits fused multiply-add

Builder = Any
Value = Any

memory: Any = cgutils.alloca_once_value
"""Takes a builder and a value; returns the address of a stack slot for a loop's accumulator, which
LLVM keeps in a register if one is free."""
counted: Any = cgutils.for_range
"""Takes a builder and a number; returns a context for a loop's body, which provides its
``index``."""


def emitter(writer: Callable[..., Any]) -> Any:
    """Makes a code emitter callable from compiled loops; a decorator.

    Arguments that are constants at compile time arrive as literals.
    """
    return intrinsic(prefer_literal=True)(writer)


def vector_length(numbers: int) -> int:
    """Returns the longest vector length that divides ``numbers``; 0 if none does."""
    return next((lanes for lanes in (16, 8) if numbers % lanes == 0), 0)


def constant(value: int) -> Value:
    """Returns a constant index or offset."""
    return INT(value)


def constant_vector(kind: ir.Type, value: float, lanes: int) -> Value:
    """Returns a vector with one constant in all lanes."""
    return ir.Constant(ir.VectorType(kind, lanes), [value] * lanes)


def broadcast(builder: Builder, value: Value, lanes: int) -> Value:
    """Returns a vector with one value in all lanes."""
    of = ir.VectorType(value.type, lanes)
    first = builder.insert_element(ir.Constant(of, ir.Undefined), value, ir.IntType(32)(0))
    places = ir.Constant(ir.VectorType(ir.IntType(32), lanes), [0] * lanes)
    return builder.shuffle_vector(first, ir.Constant(of, ir.Undefined), places)


def _pointer(builder: Builder, kind: ir.Type, address: Value, at: Value) -> Value:
    return builder.gep(builder.inttoptr(address, kind.as_pointer()), [at])


def load(builder: Builder, kind: ir.Type, address: Value, at: Value, lanes: int = 0) -> Value:
    """Loads a vector from element ``at`` after an address; without lanes, a single number."""
    pointer = _pointer(builder, kind, address, at)
    if lanes:
        pointer = builder.bitcast(pointer, ir.VectorType(kind, lanes).as_pointer())
    return builder.load(pointer, align=_ALIGNED[kind])


def store(builder: Builder, kind: ir.Type, value: Value, address: Value, at: Value) -> None:
    """Stores a value or vector from element ``at`` after an address."""
    pointer = builder.bitcast(_pointer(builder, kind, address, at), value.type.as_pointer())
    builder.store(value, pointer, align=_ALIGNED[kind])


def multiply(builder: Builder, one: Value, other: Value) -> Value:
    """Returns the product, which LLVM may fuse with the sum of `add` into one rounding."""
    return builder.fmul(one, other, flags=_FREE)


def add(builder: Builder, one: Value, other: Value) -> Value:
    """Returns the sum, which LLVM may fuse with the product of `multiply` into one rounding."""
    return builder.fadd(one, other, flags=_FREE)
