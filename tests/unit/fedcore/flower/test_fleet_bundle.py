"""Bundles: small objects that travel together with the call that announces them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MessageType, RecordDict
from flwr.proto.fleet_pb2 import (
    PullMessagesRequest,
    PullMessagesResponse,
    PushMessagesRequest,
    PushMessagesResponse,
)
from flwr.proto.node_pb2 import Node
from flwr.supercore.inflatable.inflatable_object import (
    InflatableObject,
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
    no_object_id_recompute,
)
from hypothesis import given
from hypothesis import strategies as st

from fedcore.errors import DataError, InvalidUpdate, TrustError
from fedcore.flower.fleet import Fleet, node_id_of
from fedcore.flower.fleet_api import ROUTES, Caller, call
from fedcore.flower.fleet_bundle import (
    BUNDLE_BYTES,
    MAX_BUNDLED,
    PULL_BUNDLE,
    PUSH_BUNDLE,
    contents_of,
    packed_bundle,
    packed_reply,
    read_bundle,
)
from fedcore.flower.identity import assume_identity
from fedcore.rpc.bundle_pb2 import Bundle
from tests.unit.fedcore.flower.answering import begun

KEY = b"a public key"
CALLER = Caller(node_id_of(KEY), KEY, "edge", grant=lambda calls: True)
NODE = Node(node_id=CALLER.node_id)


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    (tmp_path / "spool").mkdir()
    one = Fleet(tmp_path / "spool")
    assume_identity(one.open_run({"run": "{}"}))
    one.register_node(KEY)
    one.state.activate_node(CALLER.node_id, 60)
    yield one
    one.end_run()


def content(weights: int, first: float = 0.0) -> RecordDict:
    values = np.arange(weights, dtype=np.float32) + np.float32(first)
    arrays = ArrayRecord({"model": Array(values)})
    return RecordDict({"arrays": arrays, "config": ConfigRecord({"server-round": 1})})


def asked(fleet: Fleet, weights: int = 5) -> tuple[Message, str]:
    message = Message(content(weights), CALLER.node_id, MessageType.TRAIN)
    (message_id,) = fleet.send([message])
    return message, message_id


def pulled(fleet: Fleet, caller: Caller = CALLER) -> tuple[PullMessagesResponse, dict[str, bytes]]:
    raw = call(
        fleet, caller, ROUTES[PULL_BUNDLE], PullMessagesRequest(node=NODE).SerializeToString()
    )
    assert isinstance(raw, bytes)
    bundle = read_bundle(raw)
    return PullMessagesResponse.FromString(bundle.call), contents_of(bundle)


def reply_to(
    message: Message, weights: int = 5
) -> tuple[PushMessagesRequest, dict[str, InflatableObject]]:
    return begun(Message(content(weights, 0.5), reply_to=message), NODE)


def push(fleet: Fleet, bundle: Bundle) -> set[str]:
    """Pushes a bundle; returns the ids of objects that are still missing."""
    raw = call(fleet, CALLER, ROUTES[PUSH_BUNDLE], bundle.SerializeToString())
    assert isinstance(raw, bytes)
    return {*PushMessagesResponse.FromString(raw).objects_to_push}


def test_a_message_is_pulled_with_its_small_objects(fleet: Fleet) -> None:
    asked(fleet)
    answer, contents = pulled(fleet)
    (tree,) = answer.message_object_trees
    assert {one.object_id for one in iterate_object_tree(tree)} == contents.keys()
    assert len(contents) == 6


def test_what_is_large_of_a_message_is_left_out(fleet: Fleet) -> None:
    asked(fleet, weights=100_000)
    answer, contents = pulled(fleet)
    ids = {one.object_id for one in iterate_object_tree(answer.message_object_trees[0])}
    (left,) = ids - contents.keys()
    assert len(fleet.store.get(left) or b"") > 400_000


def test_no_object_comes_for_free(fleet: Fleet) -> None:
    asked(fleet)
    wanted: list[int] = []

    def grant(calls: int) -> bool:
        wanted.append(calls)
        return False

    answer, contents = pulled(fleet, replace(CALLER, grant=grant))
    assert wanted == [6], "each counts as the call that it saves"
    assert len(answer.messages_list) == 1
    assert contents == {}
    assert pulled(fleet, Caller(CALLER.node_id, KEY, "edge"))[1] == {}, "granted by nobody"


def test_a_small_reply_is_whole_after_one_call(fleet: Fleet) -> None:
    message, message_id = asked(fleet)
    begin, objects = reply_to(message)
    bundle = packed_reply(begin, objects.values())
    assert contents_of(bundle).keys() == objects.keys()
    assert push(fleet, bundle) == set()
    assert fleet.next_answered(0.0) == message_id
    taken = fleet.pop_reply(message_id)
    assert taken is not None
    assert taken.content == content(5, 0.5)


def test_objects_that_do_not_come_along_are_still_missing(fleet: Fleet) -> None:
    message, message_id = asked(fleet, weights=100_000)
    begin, objects = reply_to(message, weights=100_000)
    bundle = packed_reply(begin, objects.values())
    (large,) = objects.keys() - contents_of(bundle).keys()
    assert push(fleet, bundle) == {large}
    assert fleet.next_answered(0.0) is None
    assert push(fleet, bundle) == {large}, "it may be begun again"
    assert fleet.pending[message_id].missing == {large}


def test_an_object_in_several_places_is_brought_once(fleet: Fleet) -> None:
    message, message_id = asked(fleet)
    equal = Array(np.zeros(5, np.float32))
    twice = RecordDict({"a": ArrayRecord({"x": equal}), "b": ArrayRecord({"y": equal})})
    begin, objects = begun(Message(twice, reply_to=message), NODE)
    assert push(fleet, packed_reply(begin, objects.values())) == set()
    assert fleet.next_answered(0.0) == message_id
    assert fleet.next_answered(0.0) is None
    taken = fleet.pop_reply(message_id)
    assert taken is not None
    assert taken.content == twice


def test_what_the_reply_does_not_name_is_refused_before_any_of_it_is_stored(fleet: Fleet) -> None:
    message, message_id = asked(fleet)
    begin, objects = reply_to(message)
    bundle = packed_reply(begin, objects.values())
    bundle.objects[0] += b"!"
    with pytest.raises(InvalidUpdate, match="objects that its tree does not name"):
        push(fleet, bundle)
    assert fleet.pending[message_id].reply is None
    assert fleet.abandon(message_id)


def test_a_bundle_in_the_name_of_another_is_refused(fleet: Fleet) -> None:
    message, _ = asked(fleet)
    begin, objects = reply_to(message)
    begin.node.node_id += 2
    with pytest.raises(TrustError, match="sent a request as node"):
        push(fleet, packed_reply(begin, objects.values()))


def test_a_bundle_of_too_many_objects_is_refused() -> None:
    full = Bundle(objects=[b"x"] * MAX_BUNDLED)
    assert read_bundle(full.SerializeToString()) == full
    full.objects.append(b"")
    with pytest.raises(DataError, match=f"holds {MAX_BUNDLED + 1} objects"):
        read_bundle(full.SerializeToString())
    with pytest.raises(DataError, match="not a valid message"):
        read_bundle(b"\xff\xff")


@given(
    call_bytes=st.integers(0, 2 * BUNDLE_BYTES),
    sizes=st.lists(st.integers(0, BUNDLE_BYTES + 10), max_size=MAX_BUNDLED + 10),
)
def test_a_bundle_that_is_sent_is_one_that_is_taken(call_bytes: int, sizes: list[int]) -> None:
    packed = packed_bundle(bytes(call_bytes), (bytes(size) for size in sizes))
    assert len(packed.objects) <= MAX_BUNDLED
    assert not packed.objects or packed.ByteSize() <= ROUTES[PUSH_BUNDLE].max_bytes
    assert all(packed.objects), "an empty object would be one that has not arrived"


def test_a_message_is_sent_as_flower_would_send_it(fleet: Fleet) -> None:
    shared = content(5)
    nodes = [fleet.register_node(key) for key in (b"one", b"two")]
    messages = [Message(shared, node, MessageType.TRAIN) for node in nodes]
    sent = fleet.send(messages)
    assert len({*sent}) == 2
    for message_id, message in zip(sent, messages, strict=True):
        with no_object_id_recompute():
            objects, tree = get_all_nested_objects(message), get_object_tree(message)
        assert fleet.store.get_object_tree(message_id) == tree
        assert fleet.pending[message_id].objects == objects.keys()
        for object_id, one in objects.items():
            assert fleet.store.get(object_id) == one.deflate()
    fleet.forget(sent)
    assert len(fleet.store) == 0
