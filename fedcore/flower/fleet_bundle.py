"""Bundles: a call of the Fleet API together with the small objects that it announces.

A message to train and its reply are a dozen objects each, most of them under a kilobyte, and Flower
moves each in a call of its own. Both sides know an object's id from its content, so a bundle holds
only contents. A device bundles where the server offers it, see `fedcore.rpc.hello.BUNDLES`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from flwr.app.message.arraychunk import ArrayChunk
from flwr.proto.fleet_pb2 import PushMessagesRequest
from flwr.proto.message_pb2 import ObjectTree
from flwr.supercore.inflatable.inflatable_object import InflatableObject, iterate_object_tree
from google.protobuf.message import DecodeError

from fedcore.errors import DataError
from fedcore.flower.fleet_store import FleetStore
from fedcore.rpc.bundle_pb2 import Bundle

PULL_BUNDLE, PUSH_BUNDLE = "/v1/fleet/pull-bundle", "/v1/fleet/push-bundle"
BUNDLE_BYTES = 2**16
"""Most bytes of a bundle that a device sends, and of the objects in one that a server sends."""
MAX_BUNDLED = 64
"""Most objects of a bundle."""
_FIELD_BYTES = 4  # a field's tag, and the length of a content below `BUNDLE_BYTES`


def read_bundle(raw: bytes) -> Bundle:
    """Parses a bundle from the other side.

    Raises:
        DataError: it is no bundle, or holds too many objects.
    """
    try:
        bundle: Bundle = Bundle.FromString(raw)
    except DecodeError:
        raise DataError(
            f"Bundle: the request's {len(raw)} bytes are not a valid message. It was refused; "
            "client and server must run the same version."
        ) from None
    check_bundle(bundle)
    return bundle


def check_bundle(bundle: Bundle) -> None:
    """Checks the number of a bundle's objects.

    Raises:
        DataError: there are too many.
    """
    if len(bundle.objects) > MAX_BUNDLED:
        raise DataError(
            f"Bundle: it holds {len(bundle.objects)} objects, at most {MAX_BUNDLED} are taken. It "
            "was refused; client and server must run the same version."
        )


def contents_of(bundle: Bundle) -> dict[str, bytes]:
    """Returns the objects of a checked bundle by their ids, which are computed here."""
    return {hashlib.sha256(one).hexdigest(): one for one in bundle.objects}


def small_objects(store: FleetStore, tree: ObjectTree) -> list[bytes]:
    """Returns contents of objects in ``tree`` that the store has in memory, as many as fit."""
    ids = dict.fromkeys(one.object_id for one in iterate_object_tree(tree))
    return fitting((store.small(each) for each in ids), BUNDLE_BYTES)


def packed_bundle(call: bytes, contents: Iterable[bytes]) -> Bundle:
    """Returns a bundle of a call and as many of ``contents`` as fit in `BUNDLE_BYTES` with it."""
    return Bundle(call=call, objects=fitting(contents, BUNDLE_BYTES - len(call) - _FIELD_BYTES))


def packed_reply(begin: PushMessagesRequest, objects: Iterable[InflatableObject]) -> Bundle:
    """Returns a bundle that begins to push a reply, with the small ones of its objects."""
    few = (one for one in objects if not _is_large(one))
    return packed_bundle(begin.SerializeToString(), (one.deflate() for one in few))


def _is_large(part: InflatableObject) -> bool:
    return isinstance(part, ArrayChunk) and len(part.data) > BUNDLE_BYTES  # deflating copies it


def fitting(contents: Iterable[bytes], room_bytes: int) -> list[bytes]:
    """Returns the contents that fit in a bundle's room, in order, without empty ones."""
    found: list[bytes] = []
    for content in contents:
        size_bytes = len(content) + _FIELD_BYTES
        if content and size_bytes <= room_bytes:
            found.append(content)
            room_bytes -= size_bytes
        if len(found) == MAX_BUNDLED:
            break  # a message may have thousands more, and each takes time to look up
    return found
