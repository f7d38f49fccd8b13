"""A chunk of an update, written to its place in the array's file and hashed while it comes in.

Flower's own way holds the request, then its content, then hashes that; an update is written again
when its chunks are put together. Here a byte is touched once on its way from the network to the
file that the journal links.
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
from fedcore.flower.fleet_asked import PendingMessage
from fedcore.flower.fleet_store import LARGE_BYTES, Cut
from fedcore.updates.cuts import CUT_BYTES, cut_head
from fedcore.updates.pieces import Joined

BEGINNING_BYTES = 1024
"""So much of a request's beginning tells whether a large chunk comes: what stands before one takes
fewer bytes."""
_MOST_AFTER_BYTES = 1024  # what stands behind a chunk: the session
_BLOCK_BYTES = 2**14
"""What is written ends at a multiple of this, but at the end; less than one of them waits."""
_CONTENT = PushObjectRequest.DESCRIPTOR.fields_by_name["object_content"].number
_LENGTH_DELIMITED, _VARINT = 2, 0


@dataclass(frozen=True)
class Beginning:
    """The beginning of a request that brings a large chunk."""

    fields: bytes
    """What stands before the content."""
    body_at: int
    """Where the chunk's bytes begin, in the request."""
    head: bytes
    """What stands before those, in the content."""
    body_bytes: int


def beginning_of(raw: bytes) -> Beginning | None:
    """Reads the first bytes of a request to push an object.

    None where they are not such that a chunk of more than `LARGE_BYTES`, and no more than
    `CUT_BYTES`, follows: then the request is to be read as a whole.
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
    return Beginning(raw[:start], end, raw[at:end], body_bytes)


def _varint(raw: bytes, at: int) -> tuple[int, int]:
    """The number at a place, and where what follows it begins; that is -1 where it is cut off."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(raw):
            return 0, -1
        value |= (raw[at] & 0x7F) << shift
        at += 1
        if raw[at - 1] < 0x80:
            return value, at
    return 0, -1


class Arrival:
    """One chunk that is coming in.

    Everything but its digest and its session is checked before the first byte is written. Where
    the same chunk is pushed once more meanwhile, the later push takes its place and the earlier one
    is refused at its next byte: nothing is written where something verified lies.

    All methods are called from one thread, that of the network.
    """

    def __init__(self, fleet: Fleet, node_id: int, name: str, begun: Beginning) -> None:
        """Begins it.

        Raises:
            DataError: the request cannot be read.
            TrustError: it speaks for somebody else.
            InvalidUpdate: no reply of the caller lacks this object, or the reply gets too large.
            DiskFull: there is no room.
        """
        self._fleet, self._name, self._begun = fleet, name, begun
        self.is_whole = False
        """Whether the last byte of the request has come."""
        self._descriptor = -1
        request = _parse(begun.fields)
        self.object_id = request.object_id
        if request.node.node_id != node_id:
            raise TrustError(
                f"client {name!r}: it is node {node_id} and spoke for node "
                f"{request.node.node_id}. The call was refused."
            )
        if not request.run_id or request.run_id != fleet.run_id:
            raise InvalidUpdate(
                f"client {name!r}: spoke of a run that is not going on here. The call was "
                "refused; it may pull its messages again."
            )
        with fleet.lock:
            self._message_id, self._asked = self._lacking(node_id)
            earlier = self._asked.arriving.get(self.object_id)
            came_bytes = self._asked.came_bytes + self.content_bytes
            if earlier is not None:
                came_bytes -= earlier.content_bytes
            limit_bytes = self._asked.reply_limit_bytes
            if came_bytes > limit_bytes:
                fleet.abandon(self._message_id)
                raise InvalidUpdate(
                    f"update from client {name!r}: it holds more than {came_bytes} bytes, and at "
                    f"most {limit_bytes} are expected. It was not used."
                )
            if self.object_id not in self._asked.places:
                raise InvalidUpdate(
                    f"update from client {name!r}: a chunk of no array. It was not used."
                )
            above, place = self._asked.places[self.object_id]
            end = max(self._asked.ends.get(above, 0), place * CUT_BYTES + begun.body_bytes)
            if sum({**self._asked.ends, above: end}.values()) > limit_bytes:
                fleet.abandon(self._message_id)
                raise InvalidUpdate(
                    f"update from client {name!r}: its arrays take more than {limit_bytes} bytes, "
                    "the most that is expected. It was not used."
                )
            self._asked.ends[above] = end
            with disk_errors(fleet.store.folder):
                joined = self._asked.files.get(above) or Joined(fleet.store.folder)
                self._descriptor = os.open(joined.path, os.O_WRONLY | os.O_CLOEXEC)
            self._asked.files[above] = joined
            self._asked.came_bytes = came_bytes
            self._asked.arriving[self.object_id] = self
        self._cut = Cut(joined, place, begun.body_bytes)
        self._at, self._left = place * CUT_BYTES, begun.body_bytes
        self._hash = hashlib.sha256(begun.head)
        self._unwritten, self._after = bytearray(), bytearray()

    @property
    def came_bytes(self) -> int:
        """How many bytes of the request have come."""
        body_bytes = self._begun.body_bytes - self._left
        return self._begun.body_at + body_bytes + len(self._after)

    @property
    def content_bytes(self) -> int:
        """Of the object."""
        return len(self._begun.head) + self._begun.body_bytes

    def _lacking(self, node_id: int) -> tuple[str, PendingMessage]:
        for message_id, asked in self._fleet.asked.of(node_id):
            if asked.session and self.object_id in asked.missing:
                return message_id, asked
        raise InvalidUpdate(
            f"update from client {self._name!r}: an object that no reply of it lacks. It was not "
            "used."
        )

    def write(self, piece: bytes | memoryview) -> None:
        """Takes the next bytes of the request, after those that the beginning covers.

        Raises:
            InvalidUpdate: the chunk is pushed again, or its reply is waited for no longer.
            DataError: more follows than a request has.
            DiskFull: there is no room.
        """
        body, rest = memoryview(piece)[: self._left], memoryview(piece)[self._left :]
        if body:
            self._check_own()
            self._hash.update(body)
            self._left -= len(body)
            self._write_whole(body)
        if rest:
            self._after += rest
            if len(self._after) > _MOST_AFTER_BYTES:
                raise _unreadable(self._begun.body_at + self._begun.body_bytes)

    def _write_whole(self, body: memoryview) -> None:
        """Writes what has come as far as it fills blocks; the rest waits for the next piece.

        The system keeps a file by pages, which it finds and locks once more for each write that
        ends within one.
        """
        end = self._at + len(self._unwritten) + len(body)
        over = end % _BLOCK_BYTES if self._left else 0
        if over >= len(body):
            self._unwritten += body
            return
        parts = [memoryview(self._unwritten), body[: len(body) - over]]
        with disk_errors(self._fleet.store.folder):
            while parts:  # a disk that fills up takes a part first
                written = os.pwritev(self._descriptor, parts, self._at)
                self._at += written
                while parts and written >= len(parts[0]):
                    written -= len(parts.pop(0))
                if parts:
                    parts[0] = parts[0][written:]
        self._unwritten = bytearray(body[len(body) - over :])

    def finish(self) -> PushObjectResponse:
        """Says, once the request's last byte has come, that the chunk is there.

        Raises:
            DataError: the request cannot be read.
            InvalidUpdate: it is of another session, or was pushed again meanwhile.
        """
        if self._left:
            raise _unreadable(self._begun.body_at + self._begun.body_bytes - self._left)
        request = _parse(self._begun.fields + bytes(self._after))
        if request.object_content or request.object_id != self.object_id:
            raise _unreadable(self._begun.body_at + self._begun.body_bytes)
        fleet, asked = self._fleet, self._asked
        with fleet.lock:
            self._check_own()
            if request.session_id != asked.session:
                raise InvalidUpdate(
                    f"update from client {self._name!r}: an object that no reply of it lacks. It "
                    "was not used."
                )
        if self._hash.hexdigest() != self.object_id:
            return PushObjectResponse(stored=False)
        fleet.store.lay(self.object_id, self._cut)
        if not fleet.state.store_object(request.run_id, request.session_id, self.object_id, b""):
            fleet.store.lift(self.object_id, self._cut)
            return PushObjectResponse(stored=False)
        # A round waits for its updates to be durable: the disk is not to begin with that then.
        descriptor, self._descriptor = self._descriptor, -1
        fleet.writeback.begin(descriptor, self._at - self._begun.body_bytes, self._begun.body_bytes)
        fleet.state.store_traffic(request.run_id, bytes_sent=0, bytes_recv=self.content_bytes)
        with fleet.lock:
            # Only the push of the last object settles, whichever order threads come here in.
            last = asked.missing == {self.object_id}
            asked.missing.discard(self.object_id)
            asked.arriving.pop(self.object_id, None)
        if last:
            fleet.settle(self._message_id)
        return PushObjectResponse(stored=True)

    def close(self) -> None:
        """Lets go of the file; what was not finished may be pushed again."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
        with self._fleet.lock:
            if self._asked.arriving.get(self.object_id) is self:
                del self._asked.arriving[self.object_id]
                self._asked.came_bytes -= self.content_bytes

    def _check_own(self) -> None:
        if self._asked.arriving.get(self.object_id) is not self:
            raise InvalidUpdate(
                f"update from client {self._name!r}: an object that it pushes again meanwhile, or "
                "that nobody waits for any more. It was not used."
            )


def _parse(raw: bytes) -> PushObjectRequest:
    try:
        request: PushObjectRequest = PushObjectRequest.FromString(raw)
        return request
    except DecodeError:
        raise _unreadable(len(raw)) from None


def _unreadable(size_bytes: int) -> DataError:
    return DataError(
        f"PushObjectRequest: the request's {size_bytes} bytes are no such message. It was refused; "
        "client and server must run the same version."
    )
