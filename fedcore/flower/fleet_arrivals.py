"""Receives a chunk of an update: writes it to its array's file and hashes it as it arrives.

Flower's own code keeps the request in memory, then its content, then hashes that; it writes an
update again to concatenate its chunks. Here each byte is processed once between the network and
the file, to which the journal makes a hard link.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass

from flwr.proto.message_pb2 import PushObjectRequest, PushObjectResponse
from google.protobuf.message import DecodeError

from fedcore.errors import DataError, InvalidUpdate, TrustError
from fedcore.files import disk_errors
from fedcore.flower.fleet import Fleet
from fedcore.flower.fleet_pending import PendingMessage
from fedcore.flower.fleet_store import LARGE_BYTES, StoredChunk
from fedcore.updates.piece_digests import CUT_BYTES, cut_head
from fedcore.updates.pieces import CutFile

BEGINNING_BYTES = 1024
"""Bytes of a request's beginning that suffice to recognise a large chunk: the fields before the
chunk are shorter."""
_MAX_TRAILER_BYTES = 1024  # the fields after a chunk: the session
_BLOCK_BYTES = 2**14
"""Writes end at a multiple of this, except the last; a shorter rest waits in memory."""
_CONTENT = PushObjectRequest.DESCRIPTOR.fields_by_name["object_content"].number
_LENGTH_DELIMITED, _VARINT = 2, 0


@dataclass(frozen=True)
class RequestHead:
    """The parsed beginning of a request with a large chunk."""

    fields: bytes
    """The bytes before the content."""
    body_at: int
    """Offset of the chunk's bytes in the request."""
    head: bytes
    """Flower's header before these bytes, in the content."""
    body_bytes: int


def parse_request_head(raw: bytes) -> RequestHead | None:
    """Parses the first bytes of a request to push an object.

    Returns None unless a chunk of more than `LARGE_BYTES` and at most `CUT_BYTES` follows: the
    caller then reads the request as a whole.
    """
    at = 0
    while True:
        start, (tag, at) = at, _varint(raw, at)
        if at < 0:
            return None
        field, kind = tag >> 3, tag & 7
        value, at = _varint(raw, at)
        if at < 0:
            return None
        if field == _CONTENT and kind == _LENGTH_DELIMITED:
            break
        if kind == _LENGTH_DELIMITED:
            at += value
        elif kind != _VARINT:
            return None
    end = raw.find(b"\x00", at, at + 64) + 1
    body_bytes = value - (end - at)
    if not end or not LARGE_BYTES < body_bytes <= CUT_BYTES:
        return None
    if raw[at:end] != cut_head(body_bytes):
        return None
    return RequestHead(raw[:start], end, raw[at:end], body_bytes)


def _varint(raw: bytes, at: int) -> tuple[int, int]:
    """Returns the number at an offset, and the offset after it: -1 if it is cut off."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(raw):
            return 0, -1
        value |= (raw[at] & 0x7F) << shift
        at += 1
        if raw[at - 1] < 0x80:
            return value, at
    return 0, -1


class ChunkUpload:
    """One chunk that is arriving.

    Everything but its digest and its session is checked before the first byte is written. If the
    same chunk is pushed again meanwhile, the later push replaces the earlier one, which is rejected
    at its next byte: nothing overwrites verified data.

    All methods are called from the network thread.
    """

    def __init__(self, fleet: Fleet, node_id: int, name: str, begun: RequestHead) -> None:
        """Checks the request and opens the file.

        Raises:
            DataError: the request cannot be parsed.
            TrustError: it names another node than the caller's.
            InvalidUpdate: no reply of the caller needs this object, or the reply becomes too large.
            DiskFull: the disk has no room.
        """
        self._fleet, self._name, self._begun = fleet, name, begun
        self.is_whole = False
        """Whether the last byte of the request has arrived; the caller sets it."""
        self._descriptor = -1
        request = _parse(begun.fields)
        self.object_id = request.object_id
        if request.node.node_id != node_id:
            raise TrustError(
                f"client {name!r}: it is node {node_id} but sent a request as node "
                f"{request.node.node_id}. The request was refused."
            )
        if not request.run_id or request.run_id != fleet.run_id:
            raise InvalidUpdate(
                f"client {name!r}: it referred to a run that is not in progress. The request was "
                "refused; it may pull its messages again."
            )
        with fleet.lock:
            self._message_id, self._pending = self._lacking(node_id)
            earlier = self._pending.arriving.get(self.object_id)
            received_bytes = self._pending.received_bytes + self.content_bytes
            if earlier is not None:
                received_bytes -= earlier.content_bytes
            limit_bytes = self._pending.reply_limit_bytes
            if received_bytes > limit_bytes:
                fleet.abandon(self._message_id)
                raise InvalidUpdate(
                    f"update from client {name!r}: it has more than {received_bytes} bytes, "
                    f"expected at most {limit_bytes}. It was not used."
                )
            if self.object_id not in self._pending.places:
                raise InvalidUpdate(
                    f"update from client {name!r}: it pushed a chunk that belongs to no "
                    "array. It was not used."
                )
            above, place = self._pending.places[self.object_id]
            end = max(self._pending.ends.get(above, 0), place * CUT_BYTES + begun.body_bytes)
            if sum({**self._pending.ends, above: end}.values()) > limit_bytes:
                fleet.abandon(self._message_id)
                raise InvalidUpdate(
                    f"update from client {name!r}: its arrays have more than {limit_bytes} "
                    "bytes, the most expected. It was not used."
                )
            self._pending.ends[above] = end
            with disk_errors(fleet.store.folder):
                joined = self._pending.files.get(above) or CutFile(fleet.store.folder)
                self._descriptor = os.open(joined.path, os.O_WRONLY | os.O_CLOEXEC)
            self._pending.files[above] = joined
            self._pending.received_bytes = received_bytes
            self._pending.arriving[self.object_id] = self
        self._cut = StoredChunk(joined, place, begun.body_bytes)
        self._at, self._left = place * CUT_BYTES, begun.body_bytes
        self._hash = hashlib.sha256(begun.head)
        self._unwritten, self._after = bytearray(), bytearray()

    @property
    def received_bytes(self) -> int:
        """Bytes of the request that have arrived."""
        body_bytes = self._begun.body_bytes - self._left
        return self._begun.body_at + body_bytes + len(self._after)

    @property
    def content_bytes(self) -> int:
        """Size of the object."""
        return len(self._begun.head) + self._begun.body_bytes

    def _lacking(self, node_id: int) -> tuple[str, PendingMessage]:
        for message_id, pending in self._fleet.pending.of(node_id):
            if pending.session and self.object_id in pending.missing:
                return message_id, pending
        raise InvalidUpdate(
            f"update from client {self._name!r}: it pushed an object that no reply of its own is "
            "missing. It was not used."
        )

    def write(self, piece: bytes | memoryview) -> None:
        """Processes the next bytes of the request, after the parsed beginning.

        Raises:
            InvalidUpdate: the chunk is being pushed again, or its reply is no longer pending.
            DataError: the request is too long.
            DiskFull: the disk has no room.
        """
        body, rest = memoryview(piece)[: self._left], memoryview(piece)[self._left :]
        if body:
            self._check_own()
            self._hash.update(body)
            self._left -= len(body)
            self._write_whole(body)
        if rest:
            self._after += rest
            if len(self._after) > _MAX_TRAILER_BYTES:
                raise _unreadable(self._begun.body_at + self._begun.body_bytes)

    def _write_whole(self, body: memoryview) -> None:
        """Writes as many full blocks as have arrived; the rest waits for the next piece.

        The system caches a file in pages, and must find and lock a page again for each write that
        ends within it.
        """
        end = self._at + len(self._unwritten) + len(body)
        over = end % _BLOCK_BYTES if self._left else 0
        if over >= len(body):
            self._unwritten += body
            return
        parts = [memoryview(self._unwritten), body[: len(body) - over]]
        with disk_errors(self._fleet.store.folder):
            while parts:  # a disk that is filling up accepts only a part
                written = os.pwritev(self._descriptor, parts, self._at)
                self._at += written
                while parts and written >= len(parts[0]):
                    written -= len(parts.pop(0))
                if parts:
                    parts[0] = parts[0][written:]
        self._unwritten = bytearray(body[len(body) - over :])

    def finish(self) -> PushObjectResponse:
        """Verifies the chunk after the request's last byte, stores it and returns the response.

        Raises:
            DataError: the request cannot be parsed.
            InvalidUpdate: it is of another session, or the chunk is being pushed again.
        """
        if self._left:
            raise _unreadable(self._begun.body_at + self._begun.body_bytes - self._left)
        request = _parse(self._begun.fields + bytes(self._after))
        if request.object_content or request.object_id != self.object_id:
            raise _unreadable(self._begun.body_at + self._begun.body_bytes)
        fleet, pending = self._fleet, self._pending
        with fleet.lock:
            self._check_own()
            if request.session_id != pending.session:
                raise InvalidUpdate(
                    f"update from client {self._name!r}: it pushed an object that no reply of "
                    "its own is missing. It was not used."
                )
        if self._hash.hexdigest() != self.object_id:
            return PushObjectResponse(stored=False)
        fleet.store.add_chunk(self.object_id, self._cut)
        if not fleet.state.store_object(request.run_id, request.session_id, self.object_id, b""):
            fleet.store.remove_chunk(self.object_id, self._cut)
            return PushObjectResponse(stored=False)
        fleet.state.store_traffic(request.run_id, bytes_sent=0, bytes_recv=self.content_bytes)
        with fleet.lock:
            # Only the push of the last object settles, in whatever order threads get here.
            last = pending.missing == {self.object_id}
            pending.missing.discard(self.object_id)
            pending.arriving.pop(self.object_id, None)
        if last:
            fleet.finish_reply(self._message_id)
        # A round waits until its updates are durable: start writing to disk now.
        descriptor, self._descriptor = self._descriptor, -1
        fleet.writeback.begin(descriptor, self._at - self._begun.body_bytes, self._begun.body_bytes)
        return PushObjectResponse(stored=True)

    def close(self) -> None:
        """Closes the file; an unfinished chunk may be pushed again."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
        with self._fleet.lock:
            if self._pending.arriving.get(self.object_id) is self:
                del self._pending.arriving[self.object_id]
                self._pending.received_bytes -= self.content_bytes

    def _check_own(self) -> None:
        if self._pending.arriving.get(self.object_id) is not self:
            raise InvalidUpdate(
                f"update from client {self._name!r}: it pushed an object that it is already "
                "pushing again, or that is no longer expected. It was not used."
            )


def _parse(raw: bytes) -> PushObjectRequest:
    try:
        request: PushObjectRequest = PushObjectRequest.FromString(raw)
        return request
    except DecodeError:
        raise _unreadable(len(raw)) from None


def _unreadable(size_bytes: int) -> DataError:
    return DataError(
        f"PushObjectRequest: the request's {size_bytes} bytes are not a valid message of this "
        "type. It was refused; client and server must run the same version."
    )
