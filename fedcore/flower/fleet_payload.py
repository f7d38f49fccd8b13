"""A reply that was spooled, read back with its large arrays left on disk.

Flower's own way holds every chunk, then their concatenation, then a copy of that; and it takes an
array's word for how often a chunk is repeated.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Collection
from typing import IO

from flwr.app import Array, ArrayRecord, Error, Message, RecordDict
from flwr.proto.message_pb2 import ObjectTree
from flwr.supercore.constant import HEAD_BODY_DIVIDER
from flwr.supercore.inflatable.inflatable_object import (
    InflatableObject,
    get_object_head_values_from_object_content,
    iterate_object_tree,
)
from flwr.supercore.inflatable.inflatable_utils import inflatable_class_registry

from fedcore.files import disk_errors
from fedcore.flower.fleet_store import LARGE_BYTES, FleetStore
from fedcore.updates.pieces import FileArray, Joined, JoinedArray

MAX_PLAIN_BYTES = 16 << 20
"""Most bytes of an object that holds no array's numbers: parsed, it takes up to 65 times as much.
The largest of them holds mean and deviation of each number of an input."""
_MOST_DIMENSIONS = 64
MAX_OBJECTS = 4096
"""Most objects of a reply: 20 GiB of arrays."""
_CHUNK = "ArrayChunk"


def read_message(
    store: FleetStore, tree: ObjectTree, *, limit_bytes: int, own: Collection[Joined] = ()
) -> tuple[RecordDict | None, Error | None]:
    """The content of a message whose objects are all in ``store``, or its error.

    Arrays of more than `LARGE_BYTES` are files of their own, and stay when the store drops theirs.
    ``own`` are those that chunks of this message came into; nobody else's is changed.

    Raises:
        DiskFull: there was no room for these.
        ValueError: objects refer to others than those of ``tree``, or their arrays take more than
            ``limit_bytes``. Made-up bytes raise anything else that Flower's parsers raise.
    """
    known = frozenset(one.object_id for one in iterate_object_tree(tree))
    message = _StoreReader(store, known, limit_bytes, own).read(tree.object_id)
    if not isinstance(message, Message):
        raise TypeError(f"expected a Message, got {type(message).__name__}")
    if message.has_error():
        return None, message.error
    return message.content, None


def _is_length(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**63


class ObjectReader:
    """Reads objects of one message, each once but for chunks; arrays stay in memory."""

    def __init__(
        self, get: Callable[[str], bytes | None], known: frozenset[str], limit_bytes: int
    ) -> None:
        """Reads nothing yet.

        Args:
            get: Gives an object's content; empty or None when there is none.
            known: Objects that the message says it is made of.
            limit_bytes: Most bytes of all its arrays, each chunk counted as often as it is used.
        """
        self._get = get
        self._known = known
        self.limit_bytes = self._left_bytes = limit_bytes
        self._read: dict[str, InflatableObject] = {}

    def read(self, object_id: str) -> InflatableObject:
        """The object, and what it refers to."""
        found = self._read.get(object_id)
        if found is not None:
            return found
        content = self._content(object_id)
        kind, children, _ = get_object_head_values_from_object_content(content)
        if len(content) > MAX_PLAIN_BYTES:
            raise ValueError(f"a {kind} of {len(content):,} bytes")
        if kind == Array.__qualname__:
            self._read[object_id] = self._array(content, children)
        elif kind == ArrayRecord.__qualname__:
            self._read[object_id] = self._record(content, children)
        else:
            parts = {child: self.read(child) for child in children}
            self._read[object_id] = inflatable_class_registry[kind].inflate(content, parts)
        return self._read[object_id]

    def _record(self, content: bytes, children: list[str]) -> ArrayRecord:
        record, places = ArrayRecord(), json.loads(bytes(_body(content)))
        if set(places.values()) != set(children):
            raise ValueError("a record's arrays are others than those that it names")
        for name, place in places.items():  # given as a whole, they would be read and copied
            array = self.read(place)
            if not isinstance(array, Array):
                raise TypeError(f"expected an Array, got {type(array).__name__}")
            record[name] = array
        return record

    def _array(self, content: bytes, children: list[str]) -> Array:
        described = json.loads(bytes(_body(content)))
        shape = described["shape"]
        # Before anybody multiplies them: numbers of thousands of digits take minutes.
        if len(shape) > _MOST_DIMENSIONS or not all(_is_length(one) for one in shape):
            raise ValueError(f"an array of {len(shape)} dimensions, or of an impossible length")
        # It refuses what is no description of an array.
        form = Array(described["dtype"], tuple(described["shape"]), described["stype"], b"")
        self._declared(form.dtype, form.shape)
        places = described["arraychunk_ids"]
        if len(places) > MAX_OBJECTS:
            raise ValueError(f"an array is cut into {len(places)} chunks")
        return self._filled(form, [children[place] for place in places])

    def _filled(self, form: Array, chunks: list[str]) -> Array:
        """An array like ``form`` with the bytes of its chunks."""
        file = self._together(chunks)
        if isinstance(file, io.BytesIO):
            form.data = file.getvalue()
            return form
        return FileArray(form.dtype, form.shape, form.stype, file)

    def _together(self, chunks: list[str]) -> IO[bytes]:
        """Chunks one after the other."""
        file = io.BytesIO()
        for each in chunks:
            file.write(self._part(each))
        return file

    def _part(self, object_id: str) -> memoryview:
        chunk = self._content(object_id)
        if get_object_head_values_from_object_content(chunk)[0] != _CHUNK:
            raise ValueError("an array is made of something else than chunks")
        part = _body(chunk)
        self._left_bytes -= len(part)
        if self._left_bytes < 0:
            raise self._overflow()
        return part

    def _declared(self, dtype: str, shape: tuple[int, ...]) -> None:
        """Looks at what an array says of itself; raises when it is not to be read."""

    def _overflow(self) -> Exception:
        """What arrays that are too large come to."""
        return ValueError("its arrays take more bytes than an update may have")

    def _content(self, object_id: str) -> bytes:
        content = self._get(object_id) if object_id in self._known else None
        if not content:
            raise ValueError(f"it refers to object {object_id[:16]}, which is not part of it")
        return content


class _StoreReader(ObjectReader):
    """Puts what is large together in files."""

    def __init__(
        self, store: FleetStore, known: frozenset[str], limit_bytes: int, own: Collection[Joined]
    ) -> None:
        super().__init__(store.get, known, limit_bytes)
        self._store, self._own = store, own

    def _filled(self, form: Array, chunks: list[str]) -> Array:
        """Where its chunks came into one file, that is the array's, as it lies."""
        known = self._known.issuperset(chunks)
        joined = self._store.joined(chunks, self._own) if known else None
        if joined is None:
            return super()._filled(form, chunks)
        array = JoinedArray(form.dtype, form.shape, form.stype, joined, chunks)
        self._left_bytes -= array.size_bytes
        if self._left_bytes < 0:
            raise self._overflow()
        return array

    def _together(self, chunks: list[str]) -> IO[bytes]:
        """Chunks one after the other: in memory, or in a file where they are large."""
        file: IO[bytes] = io.BytesIO()
        try:
            with disk_errors(self._store.folder):
                for each in chunks:
                    file.write(self._part(each))
                    if isinstance(file, io.BytesIO) and file.tell() > LARGE_BYTES:
                        begun, file = file, self._store.scratch()
                        file.write(begun.getbuffer())
                file.flush()
        except BaseException:
            file.close()
            raise
        return file


def _body(content: bytes) -> memoryview:
    start = content.index(HEAD_BODY_DIVIDER) + len(HEAD_BODY_DIVIDER)
    return memoryview(content)[start:]
