"""Reader of protobuf's wire format, for looking at a message from outside without its schema.

Stricter than protobuf itself: what two readers could take for different messages is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
"""Wire types; the others are groups, which no message of today has."""
_MAX_VARINT_BYTES = 10
_MAX_TAG = (1 << 32) - 1


class MalformedMessage(ValueError):
    """A message is not well formed, or has more fields than a reader is ready to look at."""


@dataclass
class FieldBudget:
    """Number of fields that may still be read from one file; the reader counts down."""

    left: int

    def spend(self) -> None:
        """Counts one field.

        Raises:
            MalformedMessage: none is left.
        """
        self.left -= 1
        if self.left < 0:
            raise MalformedMessage("it has too many fields")


def fields(message: memoryview, budget: FieldBudget) -> Iterator[tuple[int, int, int | memoryview]]:
    """Yields number, wire type and value of each field, in order.

    Args:
        message: The message's bytes; lengths are checked against them, and nothing is copied.
        budget: The fields that may be read.

    Yields:
        The value is an integer for `VARINT`, and a view of the bytes for the other types.

    Raises:
        MalformedMessage: a tag or length is not valid, or the budget is spent.
    """
    place, end = 0, len(message)
    while place < end:
        budget.spend()
        tag, place = _varint(message, place)
        number, kind = tag >> 3, tag & 7
        if not number or tag > _MAX_TAG:
            raise MalformedMessage(f"a field has the tag {tag}")
        if kind == VARINT:
            value, place = _varint(message, place)
            yield number, kind, value
            continue
        if kind == BYTES:
            size, place = _varint(message, place)
        elif kind in (FIXED64, FIXED32):
            size = 8 if kind == FIXED64 else 4
        else:
            raise MalformedMessage(f"field {number} has wire type {kind}")
        if size > end - place:
            raise MalformedMessage(f"field {number} is longer than the message that it is in")
        yield number, kind, message[place : place + size]
        place += size


def varints(message: memoryview) -> Iterator[int]:
    """Yields the numbers of a packed field.

    Raises:
        MalformedMessage: they do not end with the field.
    """
    place = 0
    while place < len(message):
        value, place = _varint(message, place)
        yield value


def _varint(message: memoryview, place: int) -> tuple[int, int]:
    value = 0
    for shift in range(_MAX_VARINT_BYTES):
        if place >= len(message):
            break
        byte = message[place]
        place += 1
        value |= (byte & 0x7F) << (7 * shift)
        if byte < 0x80:
            return value & ((1 << 64) - 1), place
    raise MalformedMessage("a number has no end")
