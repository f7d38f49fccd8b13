"""Reads the decode graph of a model's file (see `fedcore.artifacts.decode`)."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterator

from edge_client.inference.protobuf import BYTES, FieldBudget, MalformedMessage, fields
from fedcore.artifacts.decode import DECODE_KEY, MAX_GRAPH_BYTES

# Field numbers of onnx.proto.
_IR_VERSION, _GRAPH, _OPSETS, _METADATA = 1, 7, 8, 14
_INITIALIZER, _KEY, _VALUE = 5, 1, 2
_MAX_FIELDS = 2_000_000
_MAX_TEXT_BYTES = 4 * (MAX_GRAPH_BYTES // 3 + 1)


class NoDecodeGraph(ValueError):
    """A file has no decode graph that can be read; the message says why."""


def decode_onnx(onnx: bytes) -> bytes:
    """Returns the decode graph of a model as an ONNX file of its own, with the model's weights.

    The bytes are put together, not understood: what they hold is to be checked as that of any file.

    Args:
        onnx: The content of an ONNX file, from anybody.

    Raises:
        NoDecodeGraph: the file has none, more than one, or is malformed.
    """
    budget = FieldBudget(_MAX_FIELDS)
    header: list[bytes] = []
    graphs: list[memoryview] = []
    stored: list[bytes] = []
    try:
        for number, _, value in fields(memoryview(onnx), budget):
            if number == _IR_VERSION and isinstance(value, int):
                header.append(_varint(number << 3) + _varint(value))
            elif number in (_OPSETS, _GRAPH, _METADATA) and not isinstance(value, int):
                if number == _OPSETS:
                    header.append(_tagged(number, len(value)) + value)
                elif number == _GRAPH:
                    graphs.append(value)
                else:
                    stored += _stored(value, budget)
        if not stored:
            raise NoDecodeGraph("it was released without a decode graph")
        if len(stored) != 1 or len(graphs) != 1:
            raise NoDecodeGraph(f"it has {len(stored)} decode graphs and {len(graphs)} graphs")
        graph = [*stored, *_weights(graphs[0], budget)]
    except MalformedMessage as error:
        raise NoDecodeGraph(f"its bytes are not those of an ONNX file: {error}") from error
    return b"".join([*header, _tagged(_GRAPH, sum(map(len, graph))), *graph])


def _stored(entry: memoryview, budget: FieldBudget) -> list[bytes]:
    """Returns the decode graph if this entry of the metadata has one."""
    found: dict[int, list[bytes]] = {_KEY: [], _VALUE: []}
    for number, kind, value in fields(entry, budget):
        if number in found and kind == BYTES and not isinstance(value, int):
            if len(value) > _MAX_TEXT_BYTES:
                raise NoDecodeGraph(f"its metadata has a text of {len(value)} bytes")
            found[number].append(bytes(value))
    if found[_KEY] != [DECODE_KEY.encode()]:
        return []
    try:
        return [base64.b64decode(b"".join(found[_VALUE]), validate=True)]
    except binascii.Error as error:
        raise NoDecodeGraph(f"its decode graph is not base64: {error}") from error


def _weights(graph: memoryview, budget: FieldBudget) -> Iterator[bytes | memoryview]:
    for number, kind, value in fields(graph, budget):
        if number == _INITIALIZER and kind == BYTES and not isinstance(value, int):
            yield _tagged(_INITIALIZER, len(value))
            yield value


def _tagged(number: int, length: int) -> bytes:
    return _varint(number << 3 | BYTES) + _varint(length)


def _varint(value: int) -> bytes:
    found = bytearray()
    while value > 0x7F:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    found.append(value)
    return bytes(found)
