"""A reply that was spooled, read back with one copy of its arrays in memory.

Flower's own way holds every chunk, then their concatenation, then a copy of that; and it takes an
array's word for how often a chunk is repeated.
"""

from __future__ import annotations

import io
import json

from flwr.app import Array, Error, Message, RecordDict
from flwr.proto.message_pb2 import ObjectTree
from flwr.supercore.constant import HEAD_BODY_DIVIDER
from flwr.supercore.inflatable.inflatable_object import (
    InflatableObject,
    get_object_head_values_from_object_content,
    iterate_object_tree,
)
from flwr.supercore.inflatable.inflatable_utils import inflatable_class_registry

from fedcore.flower.fleet_store import FleetStore

MAX_OBJECTS = 4096
"""Most objects of a reply: 20 GiB of arrays."""
_CHUNK = "ArrayChunk"


def read_message(
    store: FleetStore, tree: ObjectTree, *, limit_bytes: int
) -> tuple[RecordDict | None, Error | None]:
    """The content of a message whose objects are all in ``store``, or its error.

    Raises:
        ValueError: objects refer to others than those of ``tree``, or their arrays take more than
            ``limit_bytes``. Made-up bytes raise anything else that Flower's parsers raise.
    """
    known = frozenset(one.object_id for one in iterate_object_tree(tree))
    message = _Reader(store, known, limit_bytes).read(tree.object_id)
    if not isinstance(message, Message):
        raise TypeError(f"expected a Message, got {type(message).__name__}")
    if message.has_error():
        return None, message.error
    return message.content, None


class _Reader:
    """Reads objects of one message, each once."""

    def __init__(self, store: FleetStore, known: frozenset[str], limit_bytes: int) -> None:
        self._store = store
        self._known = known
        self._left_bytes = limit_bytes
        self._read: dict[str, InflatableObject] = {}

    def read(self, object_id: str) -> InflatableObject:
        """The object, and what it refers to."""
        found = self._read.get(object_id)
        if found is not None:
            return found
        content = self._content(object_id)
        kind, children, _ = get_object_head_values_from_object_content(content)
        if kind == Array.__qualname__:
            self._read[object_id] = self._array(content, children)
        else:
            parts = {child: self.read(child) for child in children}
            self._read[object_id] = inflatable_class_registry[kind].inflate(content, parts)
        return self._read[object_id]

    def _array(self, content: bytes, children: list[str]) -> Array:
        described = json.loads(bytes(_body(content)))
        places, buffer = described["arraychunk_ids"], io.BytesIO()
        if len(places) > MAX_OBJECTS:
            raise ValueError(f"an array is cut into {len(places)} chunks")
        for place in places:
            chunk = self._content(children[place])
            if get_object_head_values_from_object_content(chunk)[0] != _CHUNK:
                raise ValueError("an array is made of something else than chunks")
            part = _body(chunk)
            self._left_bytes -= len(part)
            if self._left_bytes < 0:
                raise ValueError("its arrays take more bytes than an update may have")
            buffer.write(part)
            del chunk, part
        # `getvalue` of a buffer that nobody else holds hands its bytes over without a copy.
        return Array(
            str(described["dtype"]),
            tuple(described["shape"]),
            str(described["stype"]),
            buffer.getvalue(),
        )

    def _content(self, object_id: str) -> bytes:
        content = self._store.get(object_id) if object_id in self._known else None
        if not content:
            raise ValueError(f"it refers to object {object_id[:16]}, which is not part of it")
        return content


def _body(content: bytes) -> memoryview:
    start = content.index(HEAD_BODY_DIVIDER) + len(HEAD_BODY_DIVIDER)
    return memoryview(content)[start:]
