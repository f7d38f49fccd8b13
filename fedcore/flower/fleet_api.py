"""The server's Fleet API for devices: Flower's handlers, behind a check of the caller's identity.

Flower's handlers trust what a request states about its sender: they accept a reply in another
node's name, and return any object to anyone with its digest. Here the key of the TLS connection
identifies the caller, who receives only objects that were sent to it. `call` is the entry point.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass
from typing import BinaryIO, TypeVar

from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    DeactivateNodeRequest,
    PullMessagesRequest,
    PullMessagesResponse,
    PushMessagesRequest,
    PushMessagesResponse,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import (
    PullObjectRequest,
    PullObjectResponse,
    PushObjectRequest,
    PushObjectResponse,
)
from flwr.proto.run_pb2 import GetRunRequest
from flwr.supercore.error import FlowerError
from flwr.supercore.inflatable.inflatable_object import iterate_object_tree
from flwr.superlink.servicer.fleet import fleet_handlers
from google.protobuf.message import DecodeError, Message

from fedcore.errors import DataError, InvalidUpdate, TrustError
from fedcore.flower.fleet import Fleet
from fedcore.flower.fleet_bundle import (
    BUNDLE_BYTES,
    PULL_BUNDLE,
    PUSH_BUNDLE,
    contents_of,
    read_bundle,
    small_objects,
)
from fedcore.flower.fleet_tree import objects_of
from fedcore.rpc.bundle_pb2 import Bundle

_Request = TypeVar("_Request", bound=Message)

CHUNK_BYTES = 6 * 2**20
"""Most bytes of a request with an object: Flower cuts arrays at 5 MiB."""
_SMALL_BYTES = 2**16
_TREE_BYTES = 2**19


@dataclass(frozen=True)
class Caller:
    """The caller: the node whose key authenticated the connection."""

    node_id: int
    public_key: bytes
    name: str
    grant: Callable[[int], bool] = lambda calls: False
    """Takes so many calls more from the caller's rate; returns whether it had them left."""


@dataclass(frozen=True)
class FileResponse:
    """A response that is sent from a file, in pieces: ``head``, then all of ``file``."""

    head: bytes
    file: BinaryIO
    size_bytes: int
    """Bytes of both together."""


Body = bytes | BinaryIO
"""Body of a request: bytes, or a file that contains them."""


@dataclass(frozen=True)
class Route:
    """One call of the Fleet API."""

    answer: Callable[[Fleet, Caller, Body], Message | FileResponse]
    max_bytes: int
    """Most bytes of its request."""


def _parse(kind: type[_Request], body: Body) -> _Request:
    """Parses a request; the bytes of a file are in memory only for the parsing."""
    raw = body if isinstance(body, bytes) else body.read()
    try:
        request: _Request = kind.FromString(raw)
    except DecodeError:
        raise DataError(
            f"{kind.__name__}: the request's {len(raw)} bytes are not a valid message of this "
            "type. It was refused; client and server must run the same version."
        ) from None
    return request


def _is_caller(node_id: int, caller: Caller) -> None:
    if node_id != caller.node_id:
        raise TrustError(
            f"client {caller.name!r}: it is node {caller.node_id} but sent a request as node "
            f"{node_id}. The request was refused."
        )


def _activate(fleet: Fleet, caller: Caller, body: Body) -> Message:
    request = _parse(ActivateNodeRequest, body)
    if request.public_key != caller.public_key:
        raise TrustError(
            f"client {caller.name!r}: it sent a key other than its certificate's. The request "
            "was refused."
        )
    fleet.register_node(caller.public_key)
    fleet.state.deactivate_node(caller.node_id)  # Flower rejects a node that it considers online
    return fleet_handlers.activate_node(request, fleet.state)


def _deactivate(fleet: Fleet, caller: Caller, body: Body) -> Message:
    request = _parse(DeactivateNodeRequest, body)
    _is_caller(request.node_id, caller)
    return fleet_handlers.deactivate_node(request, fleet.state)


def _beat(fleet: Fleet, caller: Caller, body: Body) -> Message:
    request = _parse(SendNodeHeartbeatRequest, body)
    _is_caller(request.node.node_id, caller)
    return fleet_handlers.send_node_heartbeat(request, fleet.state)


def _pull_messages(fleet: Fleet, caller: Caller, body: Body) -> PullMessagesResponse:
    request = _parse(PullMessagesRequest, body)
    _is_caller(request.node.node_id, caller)
    # A node pulls when it is idle, so its previous message did not reach it, or its reply did not
    # arrive.
    fleet.restart(caller.node_id)
    return fleet_handlers.pull_messages(request, fleet.state, fleet.state.object_store)


def _pull_bundle(fleet: Fleet, caller: Caller, body: Body) -> Message:
    answer = _pull_messages(fleet, caller, body)
    objects: list[bytes] = []
    for message, tree in zip(answer.messages_list, answer.message_object_trees, strict=True):
        found = small_objects(fleet.store, tree)
        if caller.grant(len(found)):  # else it pulls them one by one, as its rate allows
            objects += found
            sent_bytes = sum(map(len, found))
            fleet.state.store_traffic(message.metadata.run_id, bytes_sent=sent_bytes, bytes_recv=0)
    return Bundle(call=answer.SerializeToString(), objects=objects)


def _get_run(fleet: Fleet, caller: Caller, body: Body) -> Message:
    request = _parse(GetRunRequest, body)
    _is_caller(request.node.node_id, caller)
    _is_current(fleet, request.run_id, caller)
    return fleet_handlers.get_run(request, fleet.state)


def _pull_object(fleet: Fleet, caller: Caller, body: Body) -> Message | FileResponse:
    request = _parse(PullObjectRequest, body)
    _is_caller(request.node.node_id, caller)
    _is_current(fleet, request.run_id, caller)
    with fleet.lock:
        its = any(
            request.object_id in pending.objects for _, pending in fleet.pending.of(caller.node_id)
        )
    if not its:
        raise InvalidUpdate(
            f"client {caller.name!r}: it requested an object that is not, or no longer, "
            "addressed to it. Nothing was sent; it may pull its messages again."
        )
    file = fleet.store.open(request.object_id)
    if file is None:
        return fleet_handlers.pull_object(request, fleet.state)
    size_bytes = os.fstat(file.fileno()).st_size
    # Protobuf's encoding of these fields; the content comes last, and is in the file.
    head = PullObjectResponse(object_found=True, object_available=True).SerializeToString()
    head += bytes((_CONTENT_TAG,)) + _varint(size_bytes)
    return FileResponse(head, file, len(head) + size_bytes)


_CONTENT_TAG = PullObjectResponse.DESCRIPTOR.fields_by_name["object_content"].number << 3 | 2


def _varint(number: int) -> bytes:
    """Returns a number as a protobuf varint: seven bits a byte, the last without the high bit."""
    encoded = bytearray()
    while number > 0x7F:
        encoded.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes((*encoded, number))


def _push_messages(fleet: Fleet, caller: Caller, body: Body) -> Message:
    return _begin_reply(fleet, caller, _parse(PushMessagesRequest, body), frozenset())


def _push_bundle(fleet: Fleet, caller: Caller, body: Body) -> Message:
    bundle = read_bundle(body if isinstance(body, bytes) else body.read())
    request, contents = _parse(PushMessagesRequest, bundle.call), contents_of(bundle)
    answer = _begin_reply(fleet, caller, request, contents.keys())
    run_id, left = request.messages_list[0].metadata.run_id, list[str]()
    for object_id in answer.objects_to_push:
        content = contents.get(object_id)
        if (
            content is None
            or not _store(
                fleet,
                caller,
                PushObjectRequest(
                    node=request.node,
                    run_id=run_id,
                    object_id=object_id,
                    object_content=content,
                    session_id=answer.session_id,
                ),
            ).stored
        ):
            left.append(object_id)
    answer.objects_to_push[:] = left
    return answer


def _begin_reply(
    fleet: Fleet, caller: Caller, request: PushMessagesRequest, brought: Set[str]
) -> PushMessagesResponse:
    """Registers a reply; ``brought`` are the ids of objects that come with it."""
    _is_caller(request.node.node_id, caller)
    if len(request.messages_list) != 1 or len(request.message_object_trees) != 1:
        raise _malformed(caller, "expected one message and one tree of objects")
    metadata, tree = request.messages_list[0].metadata, request.message_object_trees[0]
    _is_caller(metadata.src_node_id, caller)
    _is_current(fleet, metadata.run_id, caller)
    if tree.object_id != metadata.message_id:
        raise _malformed(caller, "its tree of objects belongs to another message")
    try:
        objects = objects_of(tree)
    except ValueError as error:  # before Flower stores any of it
        raise _malformed(caller, str(error)) from None
    if not brought <= objects:
        raise _malformed(caller, "it brings objects that its tree does not name")
    with fleet.lock:
        pending = fleet.pending.get(metadata.reply_to_message_id)
        if pending is None or pending.node_id != caller.node_id:
            raise InvalidUpdate(
                f"update from client {caller.name!r}: no open request matches it: it is late, or "
                "a duplicate. It was not used."
            )
        if pending.reply is not None and pending.reply.object_id != tree.object_id:
            raise InvalidUpdate(
                f"update from client {caller.name!r}: another reply to the same message is "
                "already being received. This one was not used."
            )
        if pending.reply is None and tree.object_id in fleet.state.message_res_store:
            raise _malformed(caller, "its identifier is that of another reply")
        if fleet.pending.sends(tree.object_id):
            raise _malformed(caller, "its identifier is that of the server's message")
        if _names_messages(fleet, objects - {tree.object_id}):
            raise _malformed(caller, "its tree of objects contains another message")
        try:
            answer = fleet_handlers.push_messages(request, fleet.state)
        except ValueError as error:  # invalid digests
            raise _malformed(caller, str(error)) from None
        missing = {one for one in objects if not fleet.store.has_arrived(one)}
        wanted = dict.fromkeys(answer.objects_to_push)  # Flower lists one for each parent
        # If Flower rejects a message, it answers as if no object were missing.
        if metadata.message_id not in fleet.state.message_res_store or not missing <= wanted.keys():
            raise _malformed(caller, "Flower's own checks refuse its metadata")
        answer.objects_to_push[:] = [one for one in wanted if one in missing]
        fleet.store.hold(objects)
        fleet.store.release(pending.held)
        pending.held = frozenset(objects)
        pending.announce(tree, answer.session_id, missing)
        complete = not missing
    if complete:
        fleet.finish_reply(metadata.reply_to_message_id)
    return answer


def _names_messages(fleet: Fleet, objects: Set[str]) -> bool:
    """Returns whether a message or a reply is among the objects: they would be deleted together."""
    return any(one in fleet.pending or one in fleet.state.message_res_store for one in objects)


def _push_object(fleet: Fleet, caller: Caller, body: Body) -> Message:
    request = _parse(PushObjectRequest, body)
    _is_caller(request.node.node_id, caller)
    _is_current(fleet, request.run_id, caller)
    return _store(fleet, caller, request)


def _store(fleet: Fleet, caller: Caller, request: PushObjectRequest) -> PushObjectResponse:
    with fleet.lock:
        owned = [
            pair
            for pair in fleet.pending.of(caller.node_id)
            if pair[1].session and pair[1].session == request.session_id
        ]
        if not owned or request.object_id not in owned[0][1].missing:
            raise InvalidUpdate(
                f"update from client {caller.name!r}: it pushed an object that no reply of its "
                "own is missing. It was not used."
            )
        message_id, pending = owned[0]
        received_bytes = pending.received_bytes + len(request.object_content)
        if received_bytes > pending.reply_limit_bytes:
            fleet.abandon(message_id)
            raise InvalidUpdate(
                f"update from client {caller.name!r}: it has more than {received_bytes} bytes, "
                f"expected at most {pending.reply_limit_bytes}. It was not used."
            )
        pending.received_bytes = received_bytes
    answer = fleet_handlers.push_object(request, fleet.state)
    with fleet.lock:
        # Only the push of the last object settles, in whatever order threads get here.
        last = answer.stored and pending.missing == {request.object_id}
        if answer.stored:
            pending.missing.discard(request.object_id)
    if last:
        fleet.finish_reply(message_id)
    return answer


def _is_current(fleet: Fleet, run_id: int, caller: Caller) -> None:
    if not run_id or run_id != fleet.run_id:
        raise InvalidUpdate(
            f"client {caller.name!r}: it referred to a run that is not in progress. The request "
            "was refused; it may pull its messages again."
        )


def _malformed(caller: Caller, why: str) -> InvalidUpdate:
    return InvalidUpdate(f"update from client {caller.name!r}: {why}. It was not used.")


ROUTES: Mapping[str, Route] = {
    "/v1/fleet/activate-node": Route(_activate, _SMALL_BYTES),
    "/v1/fleet/deactivate-node": Route(_deactivate, _SMALL_BYTES),
    "/v1/fleet/get-run": Route(_get_run, _SMALL_BYTES),
    PULL_BUNDLE: Route(_pull_bundle, _SMALL_BYTES),
    "/v1/fleet/pull-messages": Route(_pull_messages, _SMALL_BYTES),
    "/v1/fleet/pull-object": Route(_pull_object, _SMALL_BYTES),
    PUSH_BUNDLE: Route(_push_bundle, BUNDLE_BYTES),
    "/v1/fleet/push-messages": Route(_push_messages, _TREE_BYTES),
    "/v1/fleet/push-object": Route(_push_object, CHUNK_BYTES),
    "/v1/fleet/send-node-heartbeat": Route(_beat, _SMALL_BYTES),
}
"""All calls open to the network. The other calls of Flower's API are not needed: the server knows
its nodes by their certificates, so they do not register, and it never sends them code."""


@dataclass(frozen=True)
class Upload:
    """A reply that a node is about to push."""

    message_id: str
    """Id of the message that it answers."""
    max_bytes: int


def upload_of(fleet: Fleet, caller: Caller, body: bytes) -> Upload | None:
    """Returns the upload that a push of messages starts; None if it answers no pending message."""
    request = _parse(PushMessagesRequest, body)
    if not request.messages_list or not request.message_object_trees:
        return None
    message_id = request.messages_list[0].metadata.reply_to_message_id
    objects = sum(1 for _ in iterate_object_tree(request.message_object_trees[0]))
    with fleet.lock:
        pending = fleet.pending.get(message_id)
        if pending is None or pending.node_id != caller.node_id:
            return None
        return Upload(message_id, min(pending.payload_bytes, objects * CHUNK_BYTES))


def call(fleet: Fleet, caller: Caller, route: Route, body: Body) -> bytes | FileResponse:
    """Answers one call of the Fleet API.

    Raises:
        DataError: the request cannot be parsed.
        TrustError: it names another node or key than ``caller``'s.
        InvalidUpdate: it is late, a duplicate, or does not match a message to the caller.
    """
    try:
        answer = route.answer(fleet, caller, body)
        return answer if isinstance(answer, FileResponse) else bytes(answer.SerializeToString())
    except FlowerError as error:
        raise InvalidUpdate(f"client {caller.name!r}: {error.message}. Refused.") from None
