"""What devices begin and drop, in collusion too, leaves nothing behind in the server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Message, MessageType, RecordDict
from flwr.proto.fleet_pb2 import PullMessagesRequest, PushMessagesRequest
from flwr.proto.message_pb2 import ObjectTree
from flwr.proto.node_pb2 import Node
from flwr.supercore.inflatable.inflatable_object import iterate_object_tree

from fedcore.errors import InvalidUpdate
from fedcore.files import sha256_hex
from fedcore.flower import fleet_store
from fedcore.flower.fleet import Fleet, node_id_of
from fedcore.flower.fleet_api import ROUTES, Caller, call
from fedcore.flower.identity import assume_identity
from tests.unit.fedcore.flower.answering import answer_whole, begun

KEYS = (b"a public key", b"another one")
PULL, PUSH = "/v1/fleet/pull-messages", "/v1/fleet/push-messages"


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    (tmp_path / "spool").mkdir()
    one = Fleet(tmp_path / "spool")
    assume_identity(one.open_run({"run": "{}"}))
    for key in KEYS:
        one.state.activate_node(one.register_node(key), 60)
    yield one
    one.end_run()


def content(first: float) -> RecordDict:
    values = np.arange(5, dtype=np.float32) + np.float32(first)
    return RecordDict({"arrays": ArrayRecord({"model": Array(values)})})


def asked(fleet: Fleet) -> list[Message]:
    messages = [Message(content(0), node_id_of(key), MessageType.TRAIN) for key in KEYS]
    fleet.send(messages)
    return messages


def beginning(message: Message, first: float) -> PushMessagesRequest:
    node = Node(node_id=message.metadata.dst_node_id)
    return begun(Message(content(first), reply_to=message), node)[0]


def calls(fleet: Fleet, key: bytes, path: str, request: PushMessagesRequest | None = None) -> None:
    node_id = node_id_of(key)
    sent = request or PullMessagesRequest(node=Node(node_id=node_id))
    call(fleet, Caller(node_id, key, "edge"), ROUTES[path], sent.SerializeToString())


def sessions(fleet: Fleet) -> int:
    return len(fleet.state._object_push_sessions)


def test_what_is_begun_again_and_again_is_remembered_once(fleet: Fleet) -> None:
    message, _ = asked(fleet)
    for number in range(5):
        calls(fleet, KEYS[0], PUSH, beginning(message, number))
        assert sessions(fleet) == 1
        calls(fleet, KEYS[0], PULL)
        assert sessions(fleet) == 0


def test_a_reply_that_flower_refuses_leaves_no_session(fleet: Fleet) -> None:
    message, _ = asked(fleet)
    request = beginning(message, 1)
    request.messages_list[0].metadata.ttl = 1e18
    for _ in range(3):
        with pytest.raises(InvalidUpdate, match="Flower's own checks"):
            calls(fleet, KEYS[0], PUSH, request)
    assert sessions(fleet) == 0


def test_a_reply_that_is_announced_when_it_is_whole_leaves_no_session(fleet: Fleet) -> None:
    message, _ = asked(fleet)
    reply = Message(content(1), reply_to=message)
    answer_whole(fleet, KEYS[0], reply)
    for _ in range(3):
        calls(fleet, KEYS[0], PUSH, begun(reply, Node(node_id=node_id_of(KEYS[0])))[0])
    assert sessions(fleet) == 0


def test_a_reply_names_no_message_among_its_objects(fleet: Fleet) -> None:
    """It would be deleted together with the reply."""
    message, other = asked(fleet)
    calls(fleet, KEYS[1], PUSH, begun_by_other := beginning(other, 2))
    for root in (message.metadata.message_id, begun_by_other.message_object_trees[0].object_id):
        request = beginning(message, 1)
        request.message_object_trees[0].children.append(ObjectTree(object_id=root))
        with pytest.raises(InvalidUpdate, match="contains another message"):
            calls(fleet, KEYS[0], PUSH, request)
        calls(fleet, KEYS[0], PULL)
        assert root in fleet.store


def test_parents_announced_without_their_parts_leave_no_part_behind(fleet: Fleet) -> None:
    message, other = asked(fleet)
    request, reply = beginning(other, 2), Message(content(1), reply_to=message)
    node = Node(node_id=node_id_of(KEYS[0]))
    (root,) = begun(reply, node)[0].message_object_trees
    parents = [one for one in iterate_object_tree(root) if one.children and one != root]
    request.message_object_trees[0].children.extend(
        ObjectTree(object_id=one.object_id) for one in parents
    )
    calls(fleet, KEYS[1], PUSH, request)
    answer_whole(fleet, KEYS[0], reply)
    taken = fleet.pop_reply(message.metadata.message_id)
    assert taken is not None
    assert taken.content == content(1)
    fleet.forget([other.metadata.message_id])
    assert len(fleet.store) == 0


def test_a_reply_keeps_its_objects_whatever_another_says_of_them(fleet: Fleet) -> None:
    """One who can guess them announces parents without parts, and drops the parts again."""
    message, other = asked(fleet)
    request, reply = beginning(other, 2), Message(content(1), reply_to=message)
    node = Node(node_id=node_id_of(KEYS[0]))
    (root,) = begun(reply, node)[0].message_object_trees
    request.message_object_trees[0].children.extend(
        ObjectTree(object_id=one.object_id) for one in iterate_object_tree(root) if one != root
    )
    calls(fleet, KEYS[1], PUSH, request)
    answer_whole(fleet, KEYS[0], reply)
    calls(fleet, KEYS[1], PULL)
    taken = fleet.pop_reply(message.metadata.message_id)
    assert taken is not None
    assert not taken.has_error()
    assert taken.content == content(1)
    fleet.forget([other.metadata.message_id])
    assert len(fleet.store) == 0


def test_a_reply_that_is_announced_with_other_trees_leaves_none_of_them(fleet: Fleet) -> None:
    message, other = asked(fleet)
    whole = beginning(message, 1)
    for number in range(5):
        request = PushMessagesRequest.FromString(whole.SerializeToString())
        digest = sha256_hex(bytes([number]))
        request.message_object_trees[0].children.append(ObjectTree(object_id=digest))
        calls(fleet, KEYS[0], PUSH, request)
        assert digest in fleet.store
    left = sum(not one.is_available for one in fleet.store.store.values())
    assert left == 5 + 2, "its own, the first one, which Flower notes, and the last one"
    fleet.forget([message.metadata.message_id, other.metadata.message_id])
    assert len(fleet.store) == 0


def test_small_objects_in_memory_have_a_bound(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    message, other = asked(fleet)
    monkeypatch.setattr(fleet_store, "_MAX_HELD_BYTES", fleet.store._held_bytes + 1000)
    arrays = {str(place): Array(np.full(100, place, np.float32)) for place in range(30)}
    replies = [
        Message(RecordDict({"arrays": ArrayRecord(arrays)}), reply_to=message),
        Message(content(1), reply_to=other),
    ]
    for key, reply in zip(KEYS, replies, strict=True):
        answer_whole(fleet, key, reply)
    held = [one.content for one in fleet.store.store.values()]
    assert sum(map(len, held)) == fleet.store._held_bytes <= 3000
    assert held.count(b"") > 40
    for reply in replies:
        taken = fleet.pop_reply(reply.metadata.reply_to_message_id)
        assert taken is not None
        assert taken.content == reply.content
    assert len(fleet.store) == fleet.store._held_bytes == 0
    assert not [*fleet.store.folder.iterdir()]
