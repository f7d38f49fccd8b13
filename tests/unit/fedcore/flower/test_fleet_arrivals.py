"""Chunks of updates on their way from the network to their place in a file."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MessageType, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.common.serde import message_to_proto
from flwr.proto.fleet_pb2 import PushMessagesRequest, PushMessagesResponse
from flwr.proto.message_pb2 import PushObjectRequest
from flwr.proto.node_pb2 import Node
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    no_object_id_recompute,
)
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedcore.errors import DataError, InvalidUpdate, TrustError
from fedcore.flower.fleet import Fleet, node_id_of
from fedcore.flower.fleet_api import ROUTES, Caller, call
from fedcore.flower.fleet_arrivals import BEGINNING_BYTES, ChunkUpload, parse_request_head
from fedcore.flower.identity import assume_identity
from fedcore.updates.messages import weights_record
from fedcore.updates.piece_digests import CUT_BYTES, cut_head, cuts_of
from fedcore.updates.pieces import CutFileArray, FileArray, pieces

WEIGHTS = 3 * CUT_BYTES // 4 + 1000  # four chunks, the last one short
Push = Callable[[bytes], None]


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    (tmp_path / "spool").mkdir()
    one = Fleet(tmp_path / "spool")
    assume_identity(one.open_run({"run": "{}"}))
    yield one
    one.end_run()


def drawn(seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).random(WEIGHTS, np.float32)


class Sender:
    """A node with a reply that is ready to be pushed."""

    def __init__(self, fleet: Fleet, key: bytes, values: NDArray[np.float32] | None = None) -> None:
        self.fleet, self.caller = fleet, Caller(node_id_of(key), key, "edge")
        fleet.register_node(key)
        fleet.state.activate_node(self.caller.node_id, 60)
        content = RecordDict(
            {
                "arrays": ArrayRecord({"model": Array(np.zeros(WEIGHTS, np.float32))}),
                "config": ConfigRecord({"server-round": 1}),
            }
        )
        asked = Message(content, self.caller.node_id, MessageType.TRAIN)
        (self.message_id,) = fleet.send([asked])
        self.values = drawn() if values is None else values
        reply = Message(RecordDict({"arrays": weights_record(self.values)}), reply_to=asked)
        with no_object_id_recompute():
            reply.metadata.__dict__["_message_id"] = reply.object_id
            objects, tree = get_all_nested_objects(reply), get_object_tree(reply)
            self.objects = {object_id: one.deflate() for object_id, one in objects.items()}
        self.begin = PushMessagesRequest(
            node=Node(node_id=self.caller.node_id),
            messages_list=[message_to_proto(remove_content_from_message(reply))],
            message_object_trees=[tree],
            clientapp_runtime_list=[0.0],
        ).SerializeToString()
        self.session, self.wanted = "", set[str]()

    def announce(self) -> None:
        raw = call(self.fleet, self.caller, ROUTES["/v1/fleet/push-messages"], self.begin)
        assert isinstance(raw, bytes)
        answer = PushMessagesResponse.FromString(raw)
        self.session, self.wanted = answer.session_id, {*answer.objects_to_push}

    def request(self, object_id: str, content: bytes | None = None) -> bytes:
        return PushObjectRequest(
            node=Node(node_id=self.caller.node_id),
            run_id=self.fleet.run_id,
            object_id=object_id,
            object_content=self.objects[object_id] if content is None else content,
            session_id=self.session,
        ).SerializeToString()

    @property
    def chunks(self) -> list[str]:
        return [one for one, raw in self.objects.items() if len(raw) > 2**16]

    def arrival(self, raw: bytes, *, node: int | None = None) -> tuple[ChunkUpload, bytes]:
        """One that has begun, and what is to follow."""
        begun = parse_request_head(raw[:BEGINNING_BYTES])
        assert begun is not None
        one = ChunkUpload(self.fleet, node or self.caller.node_id, self.caller.name, begun)
        return one, raw[begun.body_at :]

    def push(self, raw: bytes, *, step: int = 2**16) -> bool:
        """Pushes an object as the network does; whether it was stored."""
        if parse_request_head(raw[:BEGINNING_BYTES]) is None:
            call(self.fleet, self.caller, ROUTES["/v1/fleet/push-object"], raw)
            return True
        one, rest = self.arrival(raw)
        try:
            for place in range(0, len(rest), step):
                one.write(rest[place : place + step])
            return bool(one.finish().stored)
        finally:
            one.close()

    def push_all(self, objects: Iterable[str] | None = None) -> None:
        """Pushes ``objects``, all of the reply's when None, each of which is stored."""
        for object_id in self.objects if objects is None else objects:
            assert self.push(self.request(object_id))

    def taken(self) -> FileArray:
        reply = self.fleet.pop_reply(self.message_id)
        assert reply is not None
        assert not reply.has_error(), reply.error
        array = reply.content["arrays"]["model"]  # type: ignore[index]
        assert isinstance(array, FileArray)
        return array


def spooled(fleet: Fleet) -> list[Path]:
    gc.collect()
    return sorted(fleet.store.folder.iterdir())


def test_an_update_lies_in_one_file_and_is_hashed_as_it_comes(fleet: Fleet) -> None:
    one = Sender(fleet, b"a")
    one.announce()
    for object_id in reversed(one.objects):  # in whatever order
        assert one.push(one.request(object_id), step=100_003)
    assert fleet.next_answered(0.0) == one.message_id
    array = one.taken()
    assert isinstance(array, CutFileArray)
    assert [path for path in spooled(fleet) if path.name.startswith("joined")] == [array.path]
    assert b"".join(pieces(array, 128)) == one.values.tobytes()
    known = array.cuts
    array.cuts = None  # type: ignore[assignment]
    assert [*cuts_of(array)] == [*known]
    assert [*known][:3] == one.chunks
    del array
    assert spooled(fleet) == []


@given(st.lists(st.integers(1, 200_000), min_size=1, max_size=20))
def test_whatever_pieces_a_chunk_comes_in_it_is_whole(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int]
) -> None:
    folder = tmp_path_factory.mktemp("spool")
    fleet = Fleet(folder)
    assume_identity(fleet.open_run({"run": "{}"}))
    one = Sender(fleet, b"a")
    one.announce()
    arrival, rest = one.arrival(one.request(one.chunks[0]))
    place = 0
    for size in [*sizes, len(rest)]:
        arrival.write(rest[place : place + size])
        place += size
    assert arrival.received_bytes == len(one.request(one.chunks[0]))
    assert arrival.finish().stored
    arrival.close()
    assert fleet.store.get(one.chunks[0]) == one.objects[one.chunks[0]]
    fleet.end_run()


def test_the_end_of_one_update_is_never_written_into_the_file_of_another(fleet: Fleet) -> None:
    """Which the journal may have linked: the two are the same but for their last few bytes."""
    values = drawn()
    values[-1] = 7.0
    one, other = Sender(fleet, b"a"), Sender(fleet, b"b", values)
    for each in (one, other):
        each.announce()
        each.push_all(each.wanted)
    assert not other.wanted.intersection(one.chunks)
    first = one.taken()
    second = other.taken()
    assert b"".join(pieces(first, 128)) == one.values.tobytes()
    assert b"".join(pieces(second, 128)) == other.values.tobytes() != one.values.tobytes()


def test_chunks_of_another_size_are_put_together(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flwr.app.message import array as flowers

    monkeypatch.setattr(flowers, "FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE", CUT_BYTES - 4)
    one = Sender(fleet, b"a")
    one.announce()
    one.push_all()
    array = one.taken()
    assert not isinstance(array, CutFileArray)
    assert b"".join(pieces(array, 128)) == one.values.tobytes()
    assert len(one.objects[one.chunks[0]]) == len(cut_head(CUT_BYTES - 4)) + CUT_BYTES - 4


def test_who_sends_what_another_has_sent_is_believed_what_was_verified(fleet: Fleet) -> None:
    one, other = Sender(fleet, b"a"), Sender(fleet, b"b")
    for each in (one, other):
        each.announce()
        each.push_all(each.wanted)
    assert not other.wanted.intersection(one.chunks)
    first = one.taken()
    del first
    assert b"".join(pieces(other.taken(), 128)) == other.values.tobytes()
    assert spooled(fleet) == []


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("at_once", [False, True])
def test_a_chunk_of_two_devices_lies_where_each_of_them_has_it(
    fleet: Fleet, first: int, at_once: bool
) -> None:
    """Or one device could move or write over what another has sent."""
    values, size = drawn(), CUT_BYTES // 4
    second = size - 128 // 4  # behind the head of the array
    values[second:][: 2 * size] = np.roll(values[second:][: 2 * size], size)
    both = Sender(fleet, b"a"), Sender(fleet, b"b", values)
    assert both[0].chunks[1:3] == both[1].chunks[2:0:-1]
    if at_once:  # each lacks all of its chunks, and pushes those that have come meanwhile
        for each in both:
            each.announce()
        for object_ids in zip(*(list(each.objects) for each in both), strict=True):
            for each, object_id in zip(both, object_ids, strict=True):
                each.push_all([object_id])
    else:
        for each in (both[first], both[1 - first]):
            each.announce()
            each.push_all(each.wanted)
    for each in (both[first], both[1 - first]):
        assert b"".join(pieces(each.taken(), 128)) == each.values.tobytes()
    assert spooled(fleet) == []


def test_a_chunk_of_another_reply_is_not_taken(fleet: Fleet) -> None:
    one, other = Sender(fleet, b"a"), Sender(fleet, b"b", drawn(seed=1))
    for each in (one, other):
        each.announce()
    for session in (one.session, other.session):
        one.session = session
        for object_id, content in other.objects.items():
            with pytest.raises(InvalidUpdate, match="no reply of its own is missing"):
                one.push(one.request(object_id, content))


def test_a_chunk_that_is_another_than_announced_is_not_stored_and_may_come_again(
    fleet: Fleet,
) -> None:
    one = Sender(fleet, b"a")
    one.announce()
    chunk = one.chunks[1]
    forged = bytearray(one.objects[chunk])
    forged[-1] ^= 1
    assert not one.push(one.request(chunk, bytes(forged)))
    one.push_all()
    assert b"".join(pieces(one.taken(), 128)) == one.values.tobytes()


def test_of_two_pushes_of_a_chunk_the_later_stands_and_the_earlier_writes_no_more(
    fleet: Fleet,
) -> None:
    """Or what was verified could be written over before it is linked into the journal."""
    one = Sender(fleet, b"a")
    one.announce()
    chunk = one.chunks[0]
    raw = one.request(chunk)
    earlier, rest = one.arrival(raw)
    earlier.write(rest[: 2**16])
    assert one.push(raw)
    with pytest.raises(InvalidUpdate, match="already pushing again"):
        earlier.write(b"\0" * 2**16)
    earlier.close()
    with pytest.raises(InvalidUpdate, match="no reply of its own is missing"):
        one.arrival(raw)
    one.push_all(object_id for object_id in one.objects if object_id != chunk)
    assert b"".join(pieces(one.taken(), 128)) == one.values.tobytes()


def test_what_is_forgotten_meanwhile_is_written_no_further_and_leaves_nothing(
    fleet: Fleet,
) -> None:
    one = Sender(fleet, b"a")
    one.announce()
    earlier, rest = one.arrival(one.request(one.chunks[0]))
    earlier.write(rest[: 2**16])
    fleet.forget([one.message_id])
    with pytest.raises(InvalidUpdate, match="no longer expected"):
        earlier.write(rest[2**16 :])
    earlier.close()
    del earlier
    assert spooled(fleet) == []


def test_a_push_that_breaks_off_takes_no_room_of_the_reply(fleet: Fleet) -> None:
    one = Sender(fleet, b"a")
    one.announce()
    for _ in range(20):  # more than a reply may hold, together
        earlier, rest = one.arrival(one.request(one.chunks[0]))
        earlier.write(rest[: 2**16])
        earlier.close()
    again = [one.arrival(one.request(one.chunks[0]))[0] for _ in range(20)]
    one.push_all()
    for each in again:
        each.close()
    assert b"".join(pieces(one.taken(), 128)) == one.values.tobytes()


def test_more_than_a_reply_may_hold_is_refused_before_it_is_written(fleet: Fleet) -> None:
    one = Sender(fleet, b"a")
    one.announce()
    fleet.pending[one.message_id].payload_bytes = 1000
    with pytest.raises(InvalidUpdate, match="more than 5242900 bytes"):
        one.arrival(one.request(one.chunks[0]))
    assert fleet.pending[one.message_id].reply is None
    assert spooled(fleet) == [path for path in spooled(fleet) if "joined" not in path.name]


def test_a_chunk_far_behind_the_others_is_refused_before_it_is_written(fleet: Fleet) -> None:
    """A few bytes at a far place would make a large file of holes, which is read as a whole."""
    one = Sender(fleet, b"a")
    one.announce()
    asked, chunk = fleet.pending[one.message_id], one.chunks[1]
    above, _ = asked.places[chunk]
    asked.places[chunk] = above, asked.reply_limit_bytes // CUT_BYTES + 1
    with pytest.raises(InvalidUpdate, match="its arrays have more than"):
        one.push(one.request(chunk))
    assert fleet.pending[one.message_id].reply is None
    assert not any("joined" in path.name for path in spooled(fleet))


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda one, raw: one.arrival(raw, node=5), TrustError),
        (lambda one, raw: setattr(one.fleet, "run_id", 7) or one.arrival(raw), InvalidUpdate),
        (lambda one, raw: setattr(one, "session", "x") or one.push(one.request(one.chunks[0])),
         InvalidUpdate),
        (lambda one, raw: one.push(raw + b"\x22\x01a"), DataError),
        (lambda one, raw: one.push(raw + b"\0" * 2000), DataError),
        (lambda one, raw: one.push(raw[:-200]), DataError),
        (lambda one, raw: one.push(raw + b"\x07"), DataError),
    ],
    ids=["another's node", "another run", "another session", "a second content", "a long tail",
         "too short", "no message"],
)  # fmt: skip
def test_a_request_that_is_not_its_callers_is_refused(
    fleet: Fleet, change: Callable[[Sender, bytes], object], error: type[Exception]
) -> None:
    one = Sender(fleet, b"a")
    one.announce()
    run_id = fleet.run_id
    with pytest.raises(error):
        change(one, one.request(one.chunks[0]))
    fleet.run_id = run_id
    assert one.chunks[0] in fleet.pending[one.message_id].missing
    one.session = fleet.pending[one.message_id].session
    one.push_all()
    assert b"".join(pieces(one.taken(), 128)) == one.values.tobytes()


def test_a_chunk_where_the_tree_has_none_is_refused(fleet: Fleet) -> None:
    one = Sender(fleet, b"a")
    one.announce()
    raw = one.request(one.chunks[0])
    asked = fleet.pending[one.message_id]
    asked.places.clear()
    with pytest.raises(InvalidUpdate, match="a chunk that belongs to no array"):
        one.arrival(raw)
    assert not asked.arriving


@given(st.binary(max_size=300))
def test_no_beginning_raises(raw: bytes) -> None:
    begun = parse_request_head(raw)
    assert begun is None or raw[: len(begun.fields)] == begun.fields


@pytest.mark.parametrize("body", [0, 2**16, CUT_BYTES + 1])
def test_what_is_small_or_larger_than_a_cut_is_read_as_a_whole(body: int) -> None:
    content = b"ArrayChunk  %d\0" % body + bytes(body)
    raw = PushObjectRequest(run_id=1, object_id="a" * 64, object_content=content)
    assert parse_request_head(raw.SerializeToString()[:BEGINNING_BYTES]) is None


def test_a_head_that_counts_wrongly_is_none(fleet: Fleet) -> None:
    content = b"ArrayChunk  %d\0" % 100_001 + bytes(100_000)
    raw = PushObjectRequest(run_id=1, object_id="a" * 64, object_content=content)
    assert parse_request_head(raw.SerializeToString()[:BEGINNING_BYTES]) is None
