"""Reads a server's message on a device, within limits that are checked before any allocation."""

from __future__ import annotations

import math
import ssl
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import httpx
import numpy as np
from flwr.app import Message, RecordDict
from flwr.app.message import make_message
from flwr.common.serde import message_from_proto
from flwr.proto.fleet_pb2 import (
    PullMessagesRequest,
    PullMessagesResponse,
    PushMessagesResponse,
)
from flwr.proto.message_pb2 import ObjectTree, PullObjectRequest, PullObjectResponse
from flwr.supercore.inflatable.inflatable_object import iterate_object_tree
from flwr.supercore.protobuf.client import ProtobufClientInterceptor, ProtobufRequestContext
from flwr.supernode.fleet_http_client import FleetHttpClient

from fedcore.errors import FedcoreError, InvalidUpdate, OwnerLimit
from fedcore.flower.fleet_bundle import PULL_BUNDLE, PUSH_BUNDLE
from fedcore.flower.fleet_payload import MAX_OBJECTS, ObjectReader
from fedcore.observability.foreign import foreign
from fedcore.rpc.bundle_pb2 import Bundle
from fedcore.rpc.hello import BUNDLES, WAKE_PORT
from fedcore.rpc.metered import Meter, TooLarge, Traffic, metered

ANSWER_BYTES = 2**20
"""Most bytes of a response without an object: settings, or a message's object tree."""
_FRAME_BYTES = 2**12  # overhead of the response that carries an object
_AROUND_BYTES = 2**17
"""Most bytes of a response besides its body: handshake, certificates, headers, the framing of a
short body. Also the limit before the body, because interim responses count as headers."""
_RECORDS = 16
"""Framing and TLS of a longer body may add one part in this many of its size."""
ENDING_S = 5.0
"""Seconds that a call may continue once its process is to end."""
_HEADERS = {
    *("connection", "content-encoding", "content-length", "retry-after", "transfer-encoding"),
    *(BUNDLES, WAKE_PORT),
}
"""Response headers that are kept; all others are dropped."""
LEAST_BYTES_PER_S = 4096
"""Slowest transfer allowed: a call may last its timeout plus the time of its bytes at this rate."""


@dataclass(frozen=True)
class AnnouncedMessage:
    """A pending message, of which only the metadata and object tree have been read."""

    message: Message
    """The message without content."""
    tree: ObjectTree
    """The objects that make up its content."""
    contents: Mapping[str, bytes] = field(default_factory=dict)
    """Contents that came with the announcement, by the ids that this device has computed."""

    def check(self) -> None:
        """Checks the number of announced objects.

        Raises:
            InvalidUpdate: there are more objects than any message has.
        """
        for number, _ in enumerate(iterate_object_tree(self.tree)):
            if number >= MAX_OBJECTS:
                raise InvalidUpdate(
                    f"pull: the server's message has more than {MAX_OBJECTS} objects. It was not "
                    "read; the server does not run fedcore, or is not honest."
                )


def announced_in(
    answer: PullMessagesResponse, contents: Mapping[str, bytes]
) -> AnnouncedMessage | None:
    """Returns the message that a server announces; None if there is none.

    Malformed metadata can raise any exception of Flower's parsers.
    """
    if not answer.messages_list or not answer.message_object_trees:
        return None
    metadata = message_from_proto(answer.messages_list[0]).metadata
    message = make_message(metadata=metadata, content=RecordDict())
    return AnnouncedMessage(message, answer.message_object_trees[0], contents)


class BoundedClient(FleetHttpClient):
    """Flower's HTTP client with limits on the size and duration of each response.

    It checks the size that the server declares, then counts the received bytes. It decompresses
    nothing and follows no redirection.

    Guarantee:
        Whatever the server sends, and however slowly, a call receives at most the response's limit
        plus a sixteenth of it plus 128 KiB, and ends after ``timeout_s`` plus the time for these
        bytes at `LEAST_BYTES_PER_S`.
    """

    def __init__(
        self,
        address: str,
        *,
        interceptor: ProtobufClientInterceptor,
        verify: ssl.SSLContext,
        timeout_s: float,
        stopped: Callable[[], bool],
        moved: Callable[[int], None],
    ) -> None:
        """Creates a client; opens no connection yet.

        Once ``stopped`` returns True, reading objects ends at once, and other calls have `ENDING_S`
        left. ``moved`` is a callback after each call, successful or not, with the bytes sent and
        received, including the handshake; it may block.
        """
        super().__init__(address, interceptors=[interceptor], verify=verify, timeout=timeout_s)
        self._client.follow_redirects = False
        self._timeout_s = timeout_s
        self._stopped = stopped
        self._moved = moved
        self._most = threading.local()  # one client serves several threads
        self._meter = Meter()
        metered(self._client, self._meter, keep=_HEADERS)

    def pull_bundle(self, request: PullMessagesRequest) -> Bundle:
        """Pulls the next message, together with its small objects."""
        return self._unary_unary(
            path=PULL_BUNDLE,
            rpc_method="/fedcore.Fleet/PullBundle",
            request=request,
            response_type=Bundle,
        )

    def push_bundle(self, bundle: Bundle) -> PushMessagesResponse:
        """Begins to push a reply, together with its small objects."""
        return self._unary_unary(
            path=PUSH_BUNDLE,
            rpc_method="/fedcore.Fleet/PushBundle",
            request=bundle,
            response_type=PushMessagesResponse,
        )

    def pull_object(self, request: PullObjectRequest, max_bytes: int) -> PullObjectResponse:
        """Fetches an object.

        Raises:
            OwnerLimit: the response has more than ``max_bytes``.
        """
        self._most.bytes = max_bytes
        try:
            return self.PullObject(request)
        except TooLarge as error:
            raise OwnerLimit(
                f"pull: an object in the server's message is too large: {error}, the rest of "
                "what the installed task's model and the owner allow. The rest was not read; "
                "server and device must run the same task, or the owner must allow more "
                "(max_round_bytes, max_memory_bytes)."
            ) from None
        finally:
            self._most.bytes = None

    def _send(self, context: ProtobufRequestContext, *, stream: bool = False) -> httpx.Response:
        """Sends through the interceptors; returns the response with its body in memory."""
        max_bytes: int | None = getattr(self._most, "bytes", None)
        taken_bytes = ANSWER_BYTES if max_bytes is None else max_bytes
        ending_s = ENDING_S if max_bytes is None else 0.0

        def send(current: ProtobufRequestContext) -> httpx.Response:
            current.request.headers["accept-encoding"] = "identity"
            limit_bytes = taken_bytes + taken_bytes // _RECORDS + _AROUND_BYTES
            slowest_s = (len(current.request.content) + limit_bytes) / LEAST_BYTES_PER_S
            until_s = time.monotonic() + self._timeout_s + slowest_s
            traffic = Traffic(_AROUND_BYTES, until_s, self._stopped, ending_s)
            try:
                with self._meter.counted(traffic):
                    response = self._client.send(current.request, stream=True)
                    traffic.max_bytes = limit_bytes
                    try:
                        content = read_bounded(response, taken_bytes, traffic.piece)
                    finally:
                        response.close()
            finally:
                self._moved(traffic.sent_bytes + traffic.received_bytes)
            return httpx.Response(
                response.status_code,
                headers=response.headers,
                content=content,
                request=response.request,
            )

        call: _Call = send
        for interceptor in reversed(self._interceptors):
            call = _around(interceptor.intercept, call)
        return call(context)


_Call = Callable[[ProtobufRequestContext], httpx.Response]


def _around(
    intercept: Callable[[ProtobufRequestContext, _Call], httpx.Response], inner: _Call
) -> _Call:
    return lambda context: intercept(context, inner)


def read_bounded(
    response: httpx.Response, max_bytes: int, count: Callable[[], None] = lambda: None
) -> bytes:
    """Reads the body of a streamed response, up to a limit.

    Args:
        response: The response, with its headers received.
        max_bytes: Most bytes of its body.
        count: Called for each piece of the body; may raise `TooLarge`.

    Raises:
        TooLarge: the response declares or sends more bytes.
        ValueError: the response is compressed.
    """
    coding = response.headers.get("content-encoding", "identity")
    if coding != "identity":
        raise ValueError("the response is compressed, which was not requested")
    declared = response.headers.get("content-length", "")
    if declared.isdecimal() and (len(declared) > 19 or int(declared) > max_bytes):
        raise TooLarge(f"{declared[:19]} bytes are declared, expected at most {max_bytes}")
    body = bytearray()
    for piece in response.iter_raw():
        count()
        if len(body) + len(piece) > max_bytes:
            came = len(body) + len(piece)
            raise TooLarge(f"{came} bytes were received, expected at most {max_bytes}")
        body += piece
    return bytes(body)


def read_content(
    announced: AnnouncedMessage, pull: Callable[[str, int], bytes], *, limit_bytes: int
) -> RecordDict:
    """Fetches the content of a message, within ``limit_bytes`` of memory.

    Args:
        announced: The message's object tree.
        pull: Fetches one object, given its id and the most bytes it may have.
        limit_bytes: Most bytes of all objects together; each counts as often as it is used.

    Raises:
        OwnerLimit: the content is larger.
        InvalidUpdate: it is no message of a fedcore server.
    """
    announced.check()
    known = frozenset(one.object_id for one in iterate_object_tree(announced.tree))
    try:
        pulled = _Pulled(pull, limit_bytes)
        read = _Reader(pulled.get, known, limit_bytes).read(announced.tree.object_id)
        if not isinstance(read, Message) or read.has_error():
            raise TypeError(f"expected a Message with content, got {type(read).__name__}")
        return read.content
    except (FedcoreError, ConnectionError):
        raise
    except Exception as error:  # Flower's parsers fail in many ways on malicious bytes
        raise InvalidUpdate(
            f"pull: cannot read the server's message ({type(error).__name__}: "
            f"{foreign(error, 200)}). Nothing was done; server and client must run the same "
            "version."
        ) from None


class _Pulled:
    """Fetches the objects of one message on demand, and caches the last one."""

    def __init__(self, pull: Callable[[str, int], bytes], limit_bytes: int) -> None:
        self._pull = pull
        self._limit_bytes = self._left_bytes = limit_bytes
        self._last = ("", b"")

    def get(self, object_id: str) -> bytes:
        """Returns an object's content, if the limit allows."""
        if self._last[0] != object_id:
            self._last = ("", b"")  # frees its memory before the next object arrives
            content = self._pull(object_id, self._left_bytes + _FRAME_BYTES)
            self._last = (object_id, content)
        content = self._last[1]
        self._left_bytes -= len(content)
        if self._left_bytes < 0:
            raise _message_too_large(self._limit_bytes)
        return content


class _Reader(ObjectReader):
    """An object parser that checks declared sizes and raises `OwnerLimit` for large arrays."""

    def _declared(self, dtype: str, shape: tuple[int, ...]) -> None:
        if min(shape, default=0) < 0:
            raise ValueError(f"an array of shape {shape[:8]}")
        if math.prod(shape) * np.dtype(dtype).itemsize > self.limit_bytes:
            raise _message_too_large(self.limit_bytes)

    def _overflow(self) -> Exception:
        return _message_too_large(self.limit_bytes)


def _message_too_large(limit_bytes: int) -> OwnerLimit:
    return OwnerLimit(
        f"pull: the server's message has more than {limit_bytes:,} bytes, the most that the "
        "installed task's model and the owner allow. The rest was not read; server and device "
        "must run the same task, or the owner must allow more (max_round_bytes, "
        "max_memory_bytes)."
    )
