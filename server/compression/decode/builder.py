"""A decode graph while it is built: which axes stand for positions, and what was emitted so far."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from fedcore.artifacts.decode import CACHE, NEXT, POSITIONS, PREFIX, STATE
from server.compression.decode.errors import NotDecodable
from server.compression.decode.observe import ObservedGraph

_CACHED = frozenset({TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BOOL, TensorProto.INT64})


@dataclass(frozen=True)
class Axes:
    """Axes of a tensor that stand for positions.

    A tensor of the model has all T positions on either. In the decode graph it has the S new ones
    on the query axis, and all T on the key axis, of which those that are yet to come are masked.
    """

    query: int | None = None
    key: int | None = None


@dataclass(frozen=True)
class Cached:
    """A cache of a decode graph: an input, and the output that replaces it."""

    name: str
    shape: tuple[int, ...]
    type: int


class Builder:
    """Collects a decode graph. Tensors keep their names; what is new begins with `PREFIX`."""

    def __init__(self, seen: ObservedGraph, window: int) -> None:
        """Starts an empty graph for a model that was observed."""
        self.seen, self.window = seen, window
        self.axes: dict[str, Axes] = {}
        """Of the tensors that depend on the tokens."""
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[TensorProto] = []
        self.caches: list[Cached] = []
        self._made: dict[tuple[Any, ...], str] = {}

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns the shape that a tensor has in the model, for one sequence."""
        return self.seen.shapes[name]

    def value(self, node: onnx.NodeProto, at: int) -> list[int] | None:
        """Returns the integers of an input that may not depend on the tokens; None without it."""
        name = node.input[at] if at < len(node.input) else ""
        if not name:
            return None
        if name not in self.seen.values:
            raise refused(node, "takes sizes from the tokens")
        found: list[int] = np.asarray(self.seen.values[name]).reshape(-1).tolist()
        return found

    def integers(self, values: Sequence[int] | np.ndarray[Any, Any]) -> str:
        """Returns the name of a constant of int64."""
        array = np.asarray(values, np.int64)
        key = ("integers", array.shape, array.tobytes())
        if key not in self._made:
            self._made[key] = self._name("constant")
            self.constants.append(numpy_helper.from_array(array, self._made[key]))
        return self._made[key]

    def constant(self, name: str, value: np.ndarray[Any, Any]) -> None:
        """Adds a constant that has the name of a tensor of the model."""
        self.nodes.append(
            helper.make_node("Constant", [], [name], value=numpy_helper.from_array(value))
        )

    def emit(
        self, operator: str, inputs: Sequence[str], output: str | None = None, **attributes: Any
    ) -> str:
        """Adds an operator with one output, and returns the output's name."""
        name = output or self._name(operator)
        self.nodes.append(helper.make_node(operator, list(inputs), [name], **attributes))
        return name

    def keep(self, node: onnx.NodeProto, inputs: Sequence[str] | None = None) -> None:
        """Adds an operator of the model as it is, perhaps with other inputs."""
        kept = onnx.NodeProto()
        kept.CopyFrom(node)
        if inputs is not None:
            del kept.input[:]
            kept.input.extend(inputs)
        self.nodes.append(kept)

    def at_positions(self, name: str, axis: int) -> str:
        """Returns a constant of all positions, taken at the new ones."""
        key = ("at", name, axis)
        if key not in self._made:
            self._made[key] = self.emit("Gather", [name, POSITIONS], axis=axis)
        return self._made[key]

    def complete(self, name: str) -> str:
        """Returns a tensor of the new positions with those before them, from a cache."""
        key = ("complete", name)
        if key in self._made:
            return self._made[key]
        axis, shape = self.axes[name].query, self.shape(name)
        assert axis is not None
        cache = self._cache(CACHE, shape, self.seen.types.get(name, TensorProto.UNDEFINED))
        indices = self._indices(shape, axis)
        self._made[key] = self.emit(
            "ScatterElements", [cache.name, indices, name], cache.name + NEXT, axis=axis
        )
        return self._made[key]

    def state(self, shape: tuple[int, ...], of: str) -> Cached:
        """Adds a cache that an operator reads before it writes it, of the type of ``of``."""
        return self._cache(STATE, shape, self.seen.types.get(of, TensorProto.UNDEFINED))

    def _cache(self, kind: str, shape: tuple[int, ...], elements: int) -> Cached:
        if elements not in _CACHED:
            raise NotDecodable("it would have to keep numbers of a type that caches do not have")
        made = Cached(f"{kind}{len(self.caches)}", shape, elements)
        self.caches.append(made)
        return made

    def _indices(self, shape: tuple[int, ...], axis: int) -> str:
        """Returns the new positions, in the shape of a tensor of so many positions."""
        key = ("indices", shape, axis)
        if key not in self._made:
            flat = [1] * len(shape)
            flat[axis] = -1
            aligned = self.emit("Reshape", [POSITIONS, self.integers(flat)])
            count = self._count()
            parts = [shape[:axis], None, shape[axis + 1 :]]
            sizes = [count if part is None else self.integers(part) for part in parts if part != ()]
            whole = self.emit("Concat", sizes, axis=0)
            self._made[key] = self.emit("Expand", [aligned, whole])
        return self._made[key]

    def _count(self) -> str:
        key = ("count",)
        if key not in self._made:
            self._made[key] = self.emit("Shape", [POSITIONS])
        return self._made[key]

    def _name(self, what: str) -> str:
        return f"{PREFIX}{what.lower()}.{len(self.nodes)}.{len(self.constants)}"

    def aligned(
        self, node: onnx.NodeProto, names: Sequence[str], rank: int
    ) -> tuple[list[str], Axes]:
        """Brings inputs that are broadcast to ``rank`` axes to sizes that fit each other.

        Raises:
            NotDecodable: they compare or combine positions in a way that no cache can follow.
        """
        at = {name: rank - len(self.shape(name)) for name in names if name}
        known = {name: self.axes[name] for name in at if name in self.axes}
        keys = {each.key + at[name] for name, each in known.items() if each.key is not None}
        queries = {each.query + at[name] for name, each in known.items() if each.query is not None}
        if not keys and len(queries) == 2:  # each position with each other: later ones are keys
            keys = {max(queries)}
        queries -= keys
        if len(queries) > 1 or len(keys) > 1:
            raise refused(node, "combines positions along several axes")
        axes = Axes(min(queries, default=None), min(keys, default=None))
        return [self._fitted(node, name, at, axes) if name else "" for name in names], axes

    def _fitted(self, node: onnx.NodeProto, name: str, at: Mapping[str, int], axes: Axes) -> str:
        if name in self.axes:
            query = self.axes[name].query
            if query is None or query + at[name] != axes.key:
                return name
            if self.axes[name].key is not None:
                raise refused(node, "combines positions along several axes")
            return self.complete(name)
        place = -1 if axes.query is None else axes.query - at[name]
        if place < 0 or self.shape(name)[place] == 1:
            return name
        return self.at_positions(name, place)


def refused(node: onnx.NodeProto, why: str) -> NotDecodable:
    """Returns the error for an operator, with the reason."""
    name = f" ({node.name})" if node.name else ""
    return NotDecodable(f"{node.op_type}{name} {why}")
