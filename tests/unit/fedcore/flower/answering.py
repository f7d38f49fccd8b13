"""Answers a message as a device does: by the calls of the Fleet API, without a network."""

from __future__ import annotations

from flwr.app import Message
from flwr.app.message import remove_content_from_message
from flwr.common.serde import message_to_proto
from flwr.proto.fleet_pb2 import PushMessagesRequest, PushMessagesResponse
from flwr.proto.message_pb2 import PushObjectRequest
from flwr.proto.node_pb2 import Node
from flwr.supercore.inflatable.inflatable_object import (
    InflatableObject,
    get_all_nested_objects,
    get_object_tree,
    no_object_id_recompute,
)

from fedcore.flower.fleet import Fleet, node_id_of
from fedcore.flower.fleet_api import ROUTES, Caller, call
from fedcore.flower.fleet_arrivals import BEGINNING_BYTES, ChunkUpload, parse_request_head
from fedcore.flower.fleet_bundle import PUSH_BUNDLE, packed_reply


def begun(reply: Message, node: Node) -> tuple[PushMessagesRequest, dict[str, InflatableObject]]:
    """Returns what begins to push a reply, and its objects by their ids."""
    with no_object_id_recompute():
        reply.metadata.__dict__["_message_id"] = reply.object_id
        objects, tree = get_all_nested_objects(reply), get_object_tree(reply)
    begin = PushMessagesRequest(
        node=node,
        messages_list=[message_to_proto(remove_content_from_message(reply))],
        message_object_trees=[tree],
        clientapp_runtime_list=[0.0],
    )
    return begin, objects


def answer_whole(fleet: Fleet, key: bytes, reply: Message, *, to_file: bool = False) -> None:
    """Pushes a reply until the fleet has all of it; large chunks to files, as the network does."""
    caller, node = Caller(node_id_of(key), key, "edge"), Node(node_id=node_id_of(key))
    begin, objects = begun(reply, node)
    bundle = packed_reply(begin, objects.values())
    raw = call(fleet, caller, ROUTES[PUSH_BUNDLE], bundle.SerializeToString())
    assert isinstance(raw, bytes)
    answer = PushMessagesResponse.FromString(raw)
    for object_id in answer.objects_to_push:
        request = PushObjectRequest(
            node=node,
            run_id=fleet.run_id,
            object_id=object_id,
            object_content=objects[object_id].deflate(),
            session_id=answer.session_id,
        )
        raw = request.SerializeToString()
        if to_file and (beginning := parse_request_head(raw[:BEGINNING_BYTES])) is not None:
            chunk = ChunkUpload(fleet, caller.node_id, caller.name, beginning)
            chunk.write(raw[beginning.body_at :])
            assert chunk.finish().stored
        else:
            call(fleet, caller, ROUTES["/v1/fleet/push-object"], raw)
