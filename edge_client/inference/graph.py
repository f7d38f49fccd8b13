"""The operators of an ONNX file, read without the ``onnx`` package."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice

import numpy as np

from edge_client.inference.protobuf import (
    BYTES,
    VARINT,
    FieldBudget,
    MalformedMessage,
    fields,
    varints,
)

_MAX_FIELDS = 2_000_000
"""Most fields of one file that are looked at: seconds of Python."""
_MAX_NAME = 1024
_ORT_FORMAT = b"ORTM"
"""Mark of onnxruntime's own format, at byte 4: its reader would not read the file as ONNX."""

# Field numbers of onnx.proto; those of documentation and names that are not needed are left out.
_MODEL_GRAPH, _MODEL_FUNCTIONS, _MODEL_TRAINING = 7, 25, 20
_MODEL_KNOWN = {1, 2, 3, 4, 5, 6, 7, 8, 14, 20, 25, 26}
_GRAPH_NODE, _GRAPH_INITIALIZER, _GRAPH_INPUT, _GRAPH_OUTPUT, _GRAPH_SPARSE = 1, 5, 11, 12, 15
_GRAPH_KNOWN = {1, 2, 5, 10, 11, 12, 13, 14, 15, 16}
_NODE_INPUT, _NODE_OUTPUT, _NODE_NAME, _NODE_OP, _NODE_ATTRIBUTE, _NODE_DOMAIN = 1, 2, 3, 4, 5, 7
_NODE_KNOWN = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10}
_ATTRIBUTE_NAME, _ATTRIBUTE_INT, _ATTRIBUTE_INTS, _ATTRIBUTE_TEXT = 1, 3, 8, 4
_ATTRIBUTE_TENSOR, _ATTRIBUTE_TENSORS = 5, 10
_ATTRIBUTE_REFUSED = {6: "a graph", 11: "graphs", 21: "a reference", 22: "a sparse tensor"}
_ATTRIBUTE_REFUSED |= {23: "sparse tensors", 14: "a type", 15: "types"}
_ATTRIBUTE_KNOWN = {1, 2, 3, 4, 5, 7, 8, 9, 10, 13, 20}
_TENSOR_DIMS, _TENSOR_TYPE, _TENSOR_INT64, _TENSOR_RAW = 1, 2, 7, 9
_TENSOR_NAME, _TENSOR_EXTERNAL, _TENSOR_LOCATION = 8, 13, 14
_TENSOR_KNOWN = {*range(1, 13), 16}
_VALUE_NAME, _VALUE_TYPE = 1, 2
_TYPE_KNOWN, _TENSOR_TYPE_KNOWN = {1, 6}, {1, 2}
_MODEL_OPSET, _OPSET_DOMAIN, _OPSET_VERSION = 8, 1, 2
_INT64 = 7
_MOST_NUMBERS = 64
"""Most whole numbers of a tensor that are read: shapes and axes have fewer."""


class UnreadableGraph(ValueError):
    """A file holds more than a plain graph of operators; the message says what."""


@dataclass(frozen=True)
class StoredTensor:
    """Shape and type of a tensor in the file, and its numbers if they are a few of int64."""

    shape: tuple[int, ...]
    kind: int
    """ONNX's number of the type of its elements."""
    numbers: tuple[int, ...] | None = None


Attribute = int | tuple[int, ...] | str | StoredTensor | None
"""An attribute's value; None for other kinds, such as fractions."""


@dataclass(frozen=True)
class GraphNode:
    """One operator of a graph."""

    operator: str
    """The operator's name; with its domain before it, ``com.microsoft:QGemm``, if it has one."""
    inputs: tuple[str, ...]
    """Names of tensors; empty for an optional input that is left out."""
    outputs: tuple[str, ...]
    attributes: Mapping[str, Attribute] = field(default_factory=dict)


@dataclass(frozen=True)
class PlainGraph:
    """A graph without subgraphs, functions or files of its own."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    initializers: Mapping[str, StoredTensor]
    nodes: tuple[GraphNode, ...]
    kinds: Mapping[str, int]
    """ONNX's numbers of the types of the elements of each input; 0 where it is no tensor."""
    opset: int
    """Version of ONNX's own operators; 0 if the file doesn't say."""


def read_graph(onnx: bytes) -> PlainGraph:
    """Reads the graph of an ONNX file.

    Strict: a field that is unknown, given twice, or of another type is refused, as another reader
    could understand the file differently.

    Raises:
        UnreadableGraph: the file is no ONNX file, or holds subgraphs, functions, sparse tensors,
            or tensors of other files.
    """
    if onnx[4:8] == _ORT_FORMAT:
        raise UnreadableGraph("it is in onnxruntime's own format")
    budget = FieldBudget(_MAX_FIELDS)
    try:
        graph, opset = _graph_of(memoryview(onnx), budget)
        return _graph(graph, opset, budget)
    except MalformedMessage as error:
        raise UnreadableGraph(f"its bytes are not those of a plain ONNX file: {error}") from error


def _graph_of(model: memoryview, budget: FieldBudget) -> tuple[memoryview, int]:
    """Returns the graph of a model, and the version of ONNX's own operators."""
    found: list[memoryview] = []
    opsets: list[int] = []
    for number, kind, value in fields(model, budget):
        _demand_known("the model", number, _MODEL_KNOWN)
        if number in (_MODEL_FUNCTIONS, _MODEL_TRAINING):
            raise UnreadableGraph("it has functions of its own")
        if number == _MODEL_GRAPH:
            found.append(_bytes("the graph", kind, value))
        if number == _MODEL_OPSET:
            opsets += _opset(_bytes("a set of operators", kind, value), budget)
    if len(found) != 1:  # protobuf would merge several
        raise UnreadableGraph(f"it has {len(found)} graphs")
    return found[0], opsets[0] if len(opsets) == 1 else 0


def _opset(message: memoryview, budget: FieldBudget) -> list[int]:
    """Returns the version that a model demands of ONNX's own operators; empty for others."""
    domains, versions = list[str](), list[int]()
    for number, kind, value in fields(message, budget):
        if number == _OPSET_DOMAIN:
            domains.append(_text(kind, value))
        elif number == _OPSET_VERSION:
            versions.append(_whole(value))
    version = versions[-1] if versions else 0
    return [version] if _only(domains) in ("", "ai.onnx") else []


def _graph(message: memoryview, opset: int, budget: FieldBudget) -> PlainGraph:
    nodes: list[GraphNode] = []
    initializers: dict[str, StoredTensor] = {}
    kinds: dict[str, int] = {}
    outputs: list[str] = []
    for number, kind, value in fields(message, budget):
        _demand_known("the graph", number, _GRAPH_KNOWN)
        if number == _GRAPH_NODE:
            nodes.append(_node(_bytes("a node", kind, value), budget))
        elif number == _GRAPH_INITIALIZER:
            name, tensor = _tensor(_bytes("a tensor", kind, value), budget)
            if name in initializers:
                raise UnreadableGraph("two tensors have one name")
            initializers[name] = tensor
        elif number == _GRAPH_SPARSE:
            raise UnreadableGraph("it has sparse tensors")
        elif number in (_GRAPH_INPUT, _GRAPH_OUTPUT):
            name, of_elements = _value(_bytes("an input or output", kind, value), budget)
            if number == _GRAPH_OUTPUT:
                outputs.append(name)
            elif name in kinds:
                raise UnreadableGraph("two inputs have one name")
            else:
                kinds[name] = of_elements
    given = {name: of for name, of in kinds.items() if name not in initializers}
    return PlainGraph(tuple(given), tuple(outputs), initializers, tuple(nodes), given, opset)


def _node(message: memoryview, budget: FieldBudget) -> GraphNode:
    texts: dict[int, list[str]] = {number: [] for number in (1, 2, 3, 4, 7, 8)}
    attributes: dict[str, Attribute] = {}
    for number, kind, value in fields(message, budget):
        _demand_known("a node", number, _NODE_KNOWN)
        if number == _NODE_ATTRIBUTE:
            name, given = _attribute(_bytes("an attribute", kind, value), budget)
            if name in attributes:
                raise UnreadableGraph("an attribute of a node is given twice")
            attributes[name] = given
        elif number in texts:
            texts[number].append(_text(kind, value))
    operator, domain = (_only(texts[number]) for number in (_NODE_OP, _NODE_DOMAIN))
    _only(texts[_NODE_NAME])
    if _only(texts[8]):
        raise UnreadableGraph("a node names an overload of a function")
    if domain not in ("", "ai.onnx"):
        operator = f"{domain}:{operator}"
    return GraphNode(operator, tuple(texts[_NODE_INPUT]), tuple(texts[_NODE_OUTPUT]), attributes)


def _attribute(message: memoryview, budget: FieldBudget) -> tuple[str, Attribute]:
    """Returns an attribute's name and value, after checking that it holds no graph."""
    names, values = list[str](), list[Attribute]()
    whole = list[int]()
    for number, kind, value in fields(message, budget):
        if number in _ATTRIBUTE_REFUSED:
            raise UnreadableGraph(f"an attribute of a node is {_ATTRIBUTE_REFUSED[number]}")
        _demand_known("an attribute", number, _ATTRIBUTE_KNOWN)
        if number in (_ATTRIBUTE_TENSOR, _ATTRIBUTE_TENSORS):
            values.append(_tensor(_bytes("a tensor", kind, value), budget)[1])
        elif number == _ATTRIBUTE_NAME:
            names.append(_text(kind, value))
        elif number == _ATTRIBUTE_INT:
            values.append(_whole(value))
        elif number == _ATTRIBUTE_INTS:
            whole += _wholes(kind, value)
        elif number == _ATTRIBUTE_TEXT and kind == BYTES and not isinstance(value, int):
            values.append(str(value[:_MAX_NAME], "utf-8", "replace"))
    if whole:
        values.append(tuple(whole) if len(whole) <= _MOST_NUMBERS else None)
    if len(values) > 1:
        raise UnreadableGraph("an attribute of a node has two values")
    return _only(names), values[0] if values else None


def _tensor(message: memoryview, budget: FieldBudget) -> tuple[str, StoredTensor]:
    """Returns a tensor's name and shape, after checking that its numbers are in this file."""
    names: list[str] = []
    shape, kinds, numbers = list[int](), list[int](), list[int]()
    raw: memoryview | None = None
    for number, kind, value in fields(message, budget):
        if number == _TENSOR_EXTERNAL or (number == _TENSOR_LOCATION and value != 0):
            raise UnreadableGraph("the numbers of a tensor are in another file")
        if number == _TENSOR_LOCATION and kind == VARINT:
            continue
        _demand_known("a tensor", number, _TENSOR_KNOWN)
        if number == _TENSOR_NAME:
            names.append(_text(kind, value))
        elif number == _TENSOR_DIMS:
            shape += _wholes(kind, value)
        elif number == _TENSOR_TYPE:
            kinds.append(_kind(value))
        elif number == _TENSOR_INT64 and len(numbers) <= _MOST_NUMBERS:
            numbers += _wholes(kind, value)
        elif number == _TENSOR_RAW:
            raw = _bytes("the numbers of a tensor", kind, value)
    if len(shape) > _MOST_NUMBERS or min(shape, default=0) < 0:
        raise UnreadableGraph("a tensor has no possible shape")
    size, known = math.prod(shape), None
    of_elements = kinds[-1] if kinds else 0
    if of_elements == _INT64 and size <= _MOST_NUMBERS and (raw is None) != (not numbers):
        if raw is not None and len(raw) == 8 * size:
            numbers = np.frombuffer(raw, "<i8").tolist()
        known = tuple(numbers) if len(numbers) == size else None
    return _only(names), StoredTensor(tuple(shape), of_elements, known)


def _wholes(kind: int, value: int | memoryview) -> list[int]:
    """Returns repeated whole numbers, each in a field of its own or all in one.

    Of more than `_MOST_NUMBERS` in one field, returns one more than that.
    """
    if kind == VARINT or isinstance(value, int):
        return [_whole(value)]
    if kind != BYTES:
        raise UnreadableGraph("whole numbers are something else")
    return [_signed(one) for one in islice(varints(value), _MOST_NUMBERS + 1)]


def _whole(value: int | memoryview) -> int:
    if not isinstance(value, int):
        raise UnreadableGraph("a whole number is something else")
    return _signed(value)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


def _value(message: memoryview, budget: FieldBudget) -> tuple[str, int]:
    """Returns name and type of the elements of an input or output."""
    names, types, kinds = list[str](), list[memoryview](), list[int]()
    for number, kind, value in fields(message, budget):
        if number == _VALUE_NAME:
            names.append(_text(kind, value))
        elif number == _VALUE_TYPE:
            types.append(_bytes("a type", kind, value))
    for depth in (_TYPE_KNOWN, _TENSOR_TYPE_KNOWN):
        if len(types) > 1:  # protobuf would merge them
            raise UnreadableGraph("an input or output has two types")
        inner, types = types, []
        for number, kind, value in (one for each in inner for one in fields(each, budget)):
            _demand_known("a type", number, depth)
            if number == 1 and depth == _TYPE_KNOWN:
                types.append(_bytes("a type", kind, value))
            elif number == 1:
                kinds.append(_kind(value))
    return _only(names), kinds[-1] if kinds else 0


def _kind(value: int | memoryview) -> int:
    found = _whole(value)
    if abs(found) >= 1 << 31:  # protobuf keeps 32 bits of it
        raise UnreadableGraph("a tensor has no possible type")
    return found


def _demand_known(where: str, number: int, known: set[int]) -> None:
    if number not in known:
        raise UnreadableGraph(f"{where} has a field {number}, which is not known here")


def _bytes(what: str, kind: int, value: int | memoryview) -> memoryview:
    if kind != BYTES or isinstance(value, int):
        raise UnreadableGraph(f"{what} has wire type {kind}")
    return value


def _text(kind: int, value: int | memoryview) -> str:
    raw = _bytes("a name", kind, value)
    if len(raw) > _MAX_NAME:
        raise UnreadableGraph(f"a name has {len(raw)} bytes")
    try:
        return str(raw, "utf-8")
    except UnicodeDecodeError:
        raise UnreadableGraph("a name is not UTF-8") from None


def _only(texts: Sequence[str]) -> str:
    if len(texts) > 1:
        raise UnreadableGraph("a name is given twice")
    return texts[0] if texts else ""
