"""A message of the server's, read by a device: within limits, before anything is allocated."""

from __future__ import annotations

import math
import ssl
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import httpx
import numpy as np
from flwr.app import Message, RecordDict
from flwr.proto.message_pb2 import ObjectTree, PullObjectRequest, PullObjectResponse
from flwr.supercore.inflatable.inflatable_object import iterate_object_tree
from flwr.supercore.protobuf.client import ProtobufClientInterceptor, ProtobufRequestContext
from flwr.supernode.fleet_http_client import FleetHttpClient

from fedcore.errors import FedcoreError, InvalidUpdate, OwnerLimit
from fedcore.flower.fleet_payload import MAX_OBJECTS, ObjectReader
from fedcore.observability.foreign import foreign
from fedcore.rpc.hello import WAKE_PORT
from fedcore.rpc.metered import Meter, TooLarge, Traffic, metered

ANSWER_BYTES = 2**20
"""Most bytes of an answer that carries no object: settings, or a message's tree of objects."""
_FRAME_BYTES = 2**12  # around an object, in the answer that carries it
_AROUND_BYTES = 2**17
"""What may come with an answer: handshake, certificates, headers, the framing of a short body. No
more comes before its body: interim answers are headers, too."""
_RECORDS = 16
"""The framing of a longer one, and of TLS, may take a part in so many of it."""
ENDING_S = 5.0
"""How much longer a call may last when its process is to end."""
_HEADERS = {
    *("connection", "content-encoding", "content-length", "retry-after", "transfer-encoding"),
    WAKE_PORT,
}
"""Of an answer; others mean nothing here."""
LEAST_BYTES_PER_S = 4096
"""What a call must move in the long run, beside the time that any call may take."""


@dataclass(frozen=True)
class Announced:
    """A message that waits for a node, of which nothing but its metadata has been read."""

    message: Message
    """Without content."""
    tree: ObjectTree
    """The objects that its content is made of."""

    def check(self) -> None:
        """Looks at what is announced.

        Raises:
            InvalidUpdate: there are more objects than any message has.
        """
        for number, _ in enumerate(iterate_object_tree(self.tree)):
            if number >= MAX_OBJECTS:
                raise InvalidUpdate(
                    f"pull: the server's message has more than {MAX_OBJECTS} objects. It was not "
                    "read; the server is not one of fedcore, or not honest."
                )


class BoundedClient(FleetHttpClient):
    """Flower's client, which takes in no more of an answer than it was told to.

    The size that the server declares is looked at first, and what comes is counted. Nothing is
    decompressed, and no redirection is followed.

    Guarantee:
        Whatever the server sends, and however slowly, a call takes in no more bytes than its answer
        may have, a sixteenth of that and 128 KiB beside, and is over after ``timeout_s`` and
        the time that these bytes take at `LEAST_BYTES_PER_S`.
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
        """Connects to nothing yet.

        Once ``stopped`` says so, objects are read no further, and other calls have `ENDING_S` to
        be over. ``moved`` is told how many bytes each call has sent and taken in, from the
        handshake on and whatever became of it, and may wait.
        """
        super().__init__(address, interceptors=[interceptor], verify=verify, timeout=timeout_s)
        self._client.follow_redirects = False
        self._timeout_s = timeout_s
        self._stopped = stopped
        self._moved = moved
        self._most = threading.local()  # one client serves several threads
        self._meter = Meter()
        metered(self._client, self._meter, keep=_HEADERS)

    def pull_object(self, request: PullObjectRequest, most_bytes: int) -> PullObjectResponse:
        """Fetches an object.

        Raises:
            OwnerLimit: its answer has more than ``most_bytes``.
        """
        self._most.bytes = most_bytes
        try:
            return self.PullObject(request)
        except TooLarge as error:
            raise OwnerLimit(
                f"pull: an object of the server's message is too large: {error}, which is what is "
                "left of what the installed task's model and the owner allow. It was not read on; "
                "server and device must run the same task, or the owner allows more "
                "(max_round_bytes, max_memory_bytes)."
            ) from None
        finally:
            self._most.bytes = None

    def _send(self, context: ProtobufRequestContext, *, stream: bool = False) -> httpx.Response:
        """Sends through the interceptors; the answer comes back in memory."""
        most_bytes: int | None = getattr(self._most, "bytes", None)
        taken_bytes = ANSWER_BYTES if most_bytes is None else most_bytes
        ending_s = ENDING_S if most_bytes is None else 0.0

        def send(current: ProtobufRequestContext) -> httpx.Response:
            current.request.headers["accept-encoding"] = "identity"
            limit_bytes = taken_bytes + taken_bytes // _RECORDS + _AROUND_BYTES
            slowest_s = (len(current.request.content) + limit_bytes) / LEAST_BYTES_PER_S
            until_s = time.monotonic() + self._timeout_s + slowest_s
            traffic = Traffic(_AROUND_BYTES, until_s, self._stopped, ending_s)
            try:
                with self._meter.counted(traffic):
                    response = self._client.send(current.request, stream=True)
                    traffic.most_bytes = limit_bytes
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
    response: httpx.Response, most_bytes: int, count: Callable[[], None] = lambda: None
) -> bytes:
    """The body of an answer that has begun to come in, if it is no longer than it may be.

    Args:
        response: Whose body it is.
        most_bytes: How long it may be.
        count: Called for each piece of it, and may raise `TooLarge`.

    Raises:
        TooLarge: it declares more bytes, or more have come.
        ValueError: it is compressed.
    """
    coding = response.headers.get("content-encoding", "identity")
    if coding != "identity":
        raise ValueError("the answer is compressed, which was not asked for")
    declared = response.headers.get("content-length", "")
    if declared.isdecimal() and (len(declared) > 19 or int(declared) > most_bytes):
        raise TooLarge(f"{declared[:19]} bytes are declared, at most {most_bytes} are taken")
    body = bytearray()
    for piece in response.iter_raw():
        count()
        if len(body) + len(piece) > most_bytes:
            came = len(body) + len(piece)
            raise TooLarge(f"{came} bytes have come, at most {most_bytes} are taken")
        body += piece
    return bytes(body)


def read_content(
    announced: Announced, pull: Callable[[str, int], bytes], *, limit_bytes: int
) -> RecordDict:
    """The content of a message, which takes at most ``limit_bytes`` in memory.

    Args:
        announced: What the server says that it consists of.
        pull: Fetches one object, given its id and how many bytes it may have.
        limit_bytes: Most bytes of all its objects together, each counted as often as it is used.

    Raises:
        OwnerLimit: it is larger.
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
    except Exception as error:  # Flower's parsers fail in many ways on bytes that were made up
        raise InvalidUpdate(
            f"pull: the server's message cannot be read ({type(error).__name__}: "
            f"{foreign(error, 200)}). Nothing was done; server and client must run the same "
            "version."
        ) from None


class _Pulled:
    """Objects of one message, fetched as they are asked for; the last one is kept."""

    def __init__(self, pull: Callable[[str, int], bytes], limit_bytes: int) -> None:
        self._pull = pull
        self._limit_bytes = self._left_bytes = limit_bytes
        self._last = ("", b"")

    def get(self, object_id: str) -> bytes:
        """An object's content, if there is room for it."""
        if self._last[0] != object_id:
            self._last = ("", b"")  # let go before the next one takes its room
            content = self._pull(object_id, self._left_bytes + _FRAME_BYTES)
            self._last = (object_id, content)
        content = self._last[1]
        self._left_bytes -= len(content)
        if self._left_bytes < 0:
            raise _message_too_large(self._limit_bytes)
        return content


class _Reader(ObjectReader):
    """Says what is too large in a device's words, and looks at what an array declares."""

    def _declared(self, dtype: str, shape: tuple[int, ...]) -> None:
        if min(shape, default=0) < 0:
            raise ValueError(f"an array of shape {shape[:8]}")
        if math.prod(shape) * np.dtype(dtype).itemsize > self.limit_bytes:
            raise _message_too_large(self.limit_bytes)

    def _overflow(self) -> Exception:
        return _message_too_large(self.limit_bytes)


def _message_too_large(limit_bytes: int) -> OwnerLimit:
    return OwnerLimit(
        f"pull: the server's message takes more than {limit_bytes:,} bytes, which is what the "
        "installed task's model and the owner allow. It was not read on; server and device must "
        "run the same task, or the owner allows more (max_round_bytes, max_memory_bytes)."
    )
