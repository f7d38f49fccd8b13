"""Parses a spooled reply, and leaves its large arrays on disk.

Flower's own parser keeps every chunk in memory, then their concatenation, then a copy of that; and
it trusts an array's description about how often a chunk is repeated.
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
from fedcore.updates.pieces import CutFile, CutFileArray, FileArray

MAX_PLAIN_BYTES = 16 << 20
"""Most bytes of an object without array data: parsed, it takes up to 65 times as much memory. The
largest such object contains a mean and a deviation for each number of an input."""
_MAX_DIMENSIONS = 64
MAX_OBJECTS = 4096
"""Most objects of a reply; enough for 20 GiB of arrays."""
_CHUNK = "ArrayChunk"
_MAX_SCRATCH = 64
"""Most arrays of a reply in files made while it is read; each takes a file descriptor. An honest
reply's large arrays have files from their arrival, but for one whose chunks are equal."""


def read_message(
    store: FleetStore, tree: ObjectTree, *, limit_bytes: int, own: Collection[CutFile] = ()
) -> tuple[RecordDict | None, Error | None]:
    """Returns the content of a message whose objects are all in ``store``, or its error.

    Arrays of more than `LARGE_BYTES` stay in files, which survive the deletion of the stored
    objects. ``own`` are the files that received chunks of this message; no other file is changed.

    Raises:
        DiskFull: the disk has no room for these files.
        ValueError: objects refer to objects outside ``tree``, or the arrays take more than
            ``limit_bytes``. Malicious bytes can raise any exception of Flower's parsers.
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
    """Parses the objects of one message, each once except chunks; arrays stay in memory."""

    def __init__(
        self, get: Callable[[str], bytes | None], known: frozenset[str], limit_bytes: int
    ) -> None:
        """Creates a parser; reads nothing yet.

        Args:
            get: Returns an object's content; empty or None if there is none.
            known: Ids of the objects that the message declares.
            limit_bytes: Most bytes of all arrays; a chunk counts as often as it is used.
        """
        self._get = get
        self._known = known
        self.limit_bytes = self._left_bytes = limit_bytes
        self._read: dict[str, InflatableObject] = {}

    def read(self, object_id: str) -> InflatableObject:
        """Returns an object with its children."""
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
            raise ValueError("a record's arrays do not match the names that it lists")
        for name, place in places.items():  # ArrayRecord's constructor would read and copy arrays
            array = self.read(place)
            if not isinstance(array, Array):
                raise TypeError(f"expected an Array, got {type(array).__name__}")
            record[name] = array
        return record

    def _array(self, content: bytes, children: list[str]) -> Array:
        described = json.loads(bytes(_body(content)))
        shape = described["shape"]
        # Before any multiplication: numbers of thousands of digits take minutes.
        if len(shape) > _MAX_DIMENSIONS or not all(_is_length(one) for one in shape):
            raise ValueError(f"an array of {len(shape)} dimensions, or of an impossible size")
        # The constructor rejects an invalid description.
        form = Array(described["dtype"], tuple(described["shape"]), described["stype"], b"")
        self._declared(form.dtype, form.shape)
        places = described["arraychunk_ids"]
        if len(places) > MAX_OBJECTS:
            raise ValueError(f"an array is split into {len(places)} chunks")
        return self._filled(form, [children[place] for place in places])

    def _filled(self, form: Array, chunks: list[str]) -> Array:
        """Returns an array like ``form`` with the bytes of its chunks."""
        file = self._together(chunks)
        if isinstance(file, io.BytesIO):
            form.data = file.getvalue()
            return form
        return FileArray(form.dtype, form.shape, form.stype, file)

    def _together(self, chunks: list[str]) -> IO[bytes]:
        """Concatenates chunks."""
        file = io.BytesIO()
        for each in chunks:
            file.write(self._part(each))
        return file

    def _part(self, object_id: str) -> memoryview:
        chunk = self._content(object_id)
        if get_object_head_values_from_object_content(chunk)[0] != _CHUNK:
            raise ValueError("an array contains objects that are not chunks")
        part = _body(chunk)
        self._left_bytes -= len(part)
        if self._left_bytes < 0:
            raise self._overflow()
        return part

    def _declared(self, dtype: str, shape: tuple[int, ...]) -> None:
        """Checks an array's declared type and shape; a subclass raises to reject it."""

    def _overflow(self) -> Exception:
        """Returns the exception for arrays that are too large."""
        return ValueError("its arrays have more bytes than an update may have")

    def _content(self, object_id: str) -> bytes:
        content = self._get(object_id) if object_id in self._known else None
        if not content:
            raise ValueError(f"it refers to object {object_id[:16]}, which it does not contain")
        return content


class _StoreReader(ObjectReader):
    """Parses a message and assembles large arrays in files."""

    def __init__(
        self, store: FleetStore, known: frozenset[str], limit_bytes: int, own: Collection[CutFile]
    ) -> None:
        super().__init__(store.get, known, limit_bytes)
        self._store, self._own = store, own
        self._scratches = 0

    def _filled(self, form: Array, chunks: list[str]) -> Array:
        """Fills an array; uses the file that received its chunks, if there is one."""
        known = self._known.issuperset(chunks)
        joined = self._store.joined(chunks, self._own) if known else None
        if joined is None:
            return super()._filled(form, chunks)
        array = CutFileArray(form.dtype, form.shape, form.stype, joined, chunks)
        self._left_bytes -= array.size_bytes
        if self._left_bytes < 0:
            raise self._overflow()
        return array

    def _together(self, chunks: list[str]) -> IO[bytes]:
        """Concatenates chunks: in memory, or in a file if they are large."""
        file: IO[bytes] = io.BytesIO()
        try:
            with disk_errors(self._store.folder):
                for each in chunks:
                    file.write(self._part(each))
                    if isinstance(file, io.BytesIO) and file.tell() > LARGE_BYTES:
                        self._scratches += 1
                        if self._scratches > _MAX_SCRATCH:
                            raise ValueError(f"more than {_MAX_SCRATCH} arrays of equal chunks")
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
