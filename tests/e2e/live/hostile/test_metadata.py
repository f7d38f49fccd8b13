"""Replies whose metadata are made up: whatever becomes of them, the round goes on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from flwr.app import Error, Message
from flwr.proto.fleet_pb2 import PushMessagesResponse
from flwr.proto.message_pb2 import PushObjectRequest
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects

from tests.e2e.live.hostile.test_forged import PATIENCE_S, WIDE, Round, update


@pytest.fixture
def served(serve: Any) -> Iterator[Any]:
    with serve(limits=WIDE) as served:
        yield served


ODD_METADATA: tuple[dict[str, Any], ...] = (
    {"message_type": ""},
    {"message_type": "query.\x1b[2J"},
    {"message_type": "train.x" * 2000},
    {"message_type": "system.x"},
    {"ttl": float("nan")},
    {"ttl": float("inf")},
    {"ttl": -1e300},
    {"created_at": float("nan")},
    {"created_at": 1e300},
    {"created_at": -1.0},
    {"group_id": "\x1b]0;x\x07" * 2000},
    {"dst_node_id": 2**63 - 1},
    {"dst_node_id": 0},
    {"reply_to_message_id": "x"},
    {"message_id": "\x1b"},
)


@pytest.mark.parametrize("odd", ODD_METADATA, ids=lambda odd: next(iter(odd)))
def test_metadata_that_is_made_up_ends_nothing(
    served: Any, rogue: Any, odd: dict[str, Any]
) -> None:
    """Whether it is refused at the door or counts as a failure, the honest one is taken."""
    rounds, rogues = Round(served), [rogue("edge-0"), rogue("edge-1")]
    for one in rogues:
        one.activate()
    thread, tally, taken, content = rounds.begin(rogues)
    for one in rogues:
        reply = Message(update(), reply_to=one.asked())
        one.sign(reply, content)
        if one is rogues[0]:
            response = one.push(reply, **odd)
            assert response.status_code in (200, 400, 403, 409), response.text
            if response.status_code != 200:
                reply = Message(Error(1100, "\x1b[2J" * 100), reply_to=one.asked())
        if one is not rogues[0] or response.status_code != 200:
            assert set(one.push_whole(reply)) == {200}
        else:
            _push_objects(one, reply, response)
    thread.join(PATIENCE_S)
    assert not thread.is_alive()
    assert rogues[1].node.node_id in taken
    assert all(reason.isprintable() for reason in tally.reasons)


def _push_objects(one: Any, reply: Message, response: Any) -> None:
    begun = PushMessagesResponse.FromString(response.content)
    for object_id, found in get_all_nested_objects(reply).items():
        if object_id in begun.objects_to_push:
            request = PushObjectRequest(
                node=one.node,
                run_id=reply.metadata.run_id,
                object_id=object_id,
                object_content=found.deflate(),
                session_id=begun.session_id,
            )
            one.post("/v1/fleet/push-object", request)
