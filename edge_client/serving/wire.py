"""Reads and writes protobuf's wire format, with limits that a generated parser does not have.

protobuf's own parser turns two bytes of a hostile message into an object of a hundred bytes. The
reader here takes slices of the message instead, counts fields, and copies no tensor.

Source: https://protobuf.dev/programming-guides/encoding
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from fedcore.artifacts.golden import AnyArray
from fedcore.errors import RequestRefused
from fedcore.observability.foreign import foreign

MAX_FIELDS = 4096
"""Most fields of one message, and so most elements that are not packed."""
MAX_PACKED = 1 << 20
"""Most elements of one packed field; ``raw_input_contents`` holds more."""
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_MAX_VARINT_BYTES = 10


def malformed(what: str) -> RequestRefused:
    """Returns the error for bytes that are no message of the expected type."""
    return RequestRefused(f"request: malformed protobuf message: {what}. Nothing was answered.")


def varint(raw: bytes, at: int, end: int) -> tuple[int, int]:
    """Reads an unsigned integer of up to 64 bits.

    Returns:
        The number, and the position after it.

    Raises:
        RequestRefused: it does not end before ``end``, or is longer than 64 bits.
    """
    if at < end and (first := raw[at]) < 0x80:
        return first, at + 1
    value = 0
    for place in range(_MAX_VARINT_BYTES):
        if at + place >= end:
            break
        byte = raw[at + place]
        value |= (byte & 0x7F) << (7 * place)
        if byte < 0x80:
            return value & 0xFFFF_FFFF_FFFF_FFFF, at + place + 1
    raise malformed("an integer does not end")


def fields(raw: bytes, begin: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """Yields number, wire type, and start and end of the value of each field in a message.

    Args:
        raw: Holds the message.
        begin: Where the message starts.
        end: Where it ends.

    Raises:
        RequestRefused: the bytes are no message, or it has more than `MAX_FIELDS` fields.
    """
    at = begin
    for _ in range(MAX_FIELDS):
        if at >= end:
            return
        tag = raw[at]
        if tag < 0x80:
            at += 1
        else:
            tag, at = varint(raw, at, end)
        wire, start = tag & 7, at
        if wire == _BYTES:
            if at < end and (length := raw[at]) < 0x80:
                start = at + 1
            else:
                length, start = varint(raw, at, end)
            at = start + length
        elif wire == _VARINT:
            _, at = varint(raw, at, end)
        elif wire in (_FIXED32, _FIXED64):
            at += 4 if wire == _FIXED32 else 8
        else:
            raise malformed(f"wire type {wire}")
        if at > end or tag < 8:
            raise malformed("a field ends after its message" if at > end else "field number 0")
        yield tag >> 3, wire, start, at
    if at < end:
        raise malformed(f"more than {MAX_FIELDS} fields")


def need(wire: int, expected: int) -> None:
    """Raises `RequestRefused` unless a field has the expected wire type."""
    if wire != expected:
        raise malformed(f"wire type {wire} where {expected} is expected")


def text(raw: bytes, wire: int, start: int, end: int, *, max_bytes: int) -> str:
    """Reads a string field.

    Raises:
        RequestRefused: it is no string, not UTF-8, or longer than ``max_bytes``.
    """
    need(wire, _BYTES)
    if end - start > max_bytes:
        raise malformed(f"a name of {end - start} bytes, more than the {max_bytes} allowed")
    try:
        return raw[start:end].decode()
    except UnicodeDecodeError:
        raise malformed(f"{foreign(raw[start : start + 32])} is not UTF-8") from None


def packed(pieces: list[bytes], kind: str) -> AnyArray:
    """Returns the elements of a repeated number, packed or not.

    Args:
        pieces: The values of the fields, in order.
        kind: ``"f4"`` or ``"f8"``, or ``"i8"``, ``"u8"`` or ``"b"`` for varints.

    Raises:
        RequestRefused: they are no such numbers, or more than `MAX_PACKED`.
    """
    raw = pieces[0] if len(pieces) == 1 else b"".join(pieces)
    if kind in ("f4", "f8"):
        size = 4 if kind == "f4" else 8
        if len(raw) % size:
            raise malformed("a packed field ends inside a number")
        _check_count(len(raw) // size)
        return np.frombuffer(raw, f"<{kind}")
    found = _varints(np.frombuffer(raw, np.uint8))
    if kind == "b":
        return np.not_equal(found, 0)
    return found.view(np.int64) if kind == "i8" else found


def _check_count(count: int) -> None:
    if count > MAX_PACKED:
        raise RequestRefused(
            f"request: {count} elements in a field of numbers, more than the {MAX_PACKED} allowed. "
            "Nothing was answered; send tensors of this size as raw_input_contents.",
            "too_large",
        )


def _varints(raw: NDArray[np.uint8]) -> NDArray[np.uint64]:
    ends = np.flatnonzero(raw < 0x80) if raw.size <= _MAX_VARINT_BYTES * MAX_PACKED else None
    if ends is None or ends.size > MAX_PACKED:
        _check_count(MAX_PACKED + 1)
    assert ends is not None
    if raw.size and (not ends.size or ends[-1] != raw.size - 1):
        raise malformed("an integer does not end")
    starts = np.concatenate([[0], ends[:-1] + 1]) if ends.size else ends
    lengths = ends - starts + 1
    if lengths.max(initial=0) > _MAX_VARINT_BYTES:
        raise malformed("an integer of more than 64 bits")
    found = np.zeros(ends.size, np.uint64)
    for place in range(int(lengths.max(initial=0))):
        longer = lengths > place
        part = (raw[starts[longer] + place] & 0x7F).astype(np.uint64)
        found[longer] |= part << np.uint64(7 * place)
    return found


def varint_bytes(value: int) -> bytes:
    """Returns an integer as protobuf's varint; negative ones in two's complement of 64 bits."""
    value &= 0xFFFF_FFFF_FFFF_FFFF
    found = bytearray()
    while value >= 0x80:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    found.append(value)
    return bytes(found)


def bytes_field(number: int, value: bytes | bytearray | memoryview) -> bytes:
    """Returns a field of bytes, a string or a message; also when it is empty."""
    return b"".join((varint_bytes(number << 3 | _BYTES), varint_bytes(len(value)), value))


def text_field(number: int, value: str) -> bytes:
    """Returns a field with a string; nothing for an empty one, as proto3 demands."""
    return bytes_field(number, value.encode()) if value else b""


def bool_field(number: int, value: bool) -> bytes:
    """Returns a field with a truth value; nothing for False, as proto3 demands."""
    return varint_bytes(number << 3 | _VARINT) + b"\x01" if value else b""


def shape_field(number: int, shape: tuple[int, ...]) -> bytes:
    """Returns a packed field of int64; nothing for an empty shape."""
    return bytes_field(number, b"".join(map(varint_bytes, shape))) if shape else b""
