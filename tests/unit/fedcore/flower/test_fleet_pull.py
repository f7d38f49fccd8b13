"""What a device takes in from a server that may send anything."""

from __future__ import annotations

import json
import ssl
import tracemalloc
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import httpx
import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, RecordDict
from flwr.proto.fleet_pb2 import PullMessagesRequest
from flwr.proto.message_pb2 import ObjectTree, PullObjectRequest, PullObjectResponse
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree

from fedcore.errors import InvalidUpdate, OwnerLimit
from fedcore.flower import fleet_errors
from fedcore.flower.fleet_payload import MAX_PLAIN_BYTES
from fedcore.flower.fleet_pull import (
    ANSWER_BYTES,
    AnnouncedMessage,
    BoundedClient,
    read_bounded,
    read_content,
)
from fedcore.flower.identity import assume_identity
from fedcore.rpc.metered import TooLarge
from tests.unit.fedcore.rpc.serving import bounded

WEIGHTS = 3_000_000
LIMIT_BYTES = 16 << 20


@pytest.fixture(autouse=True)
def _identity() -> None:
    assume_identity(1)


def message(weights: int = WEIGHTS) -> Message:
    values = np.arange(weights, dtype=np.float32)
    content = RecordDict(
        {
            "arrays": ArrayRecord({"model": Array(values)}),
            "config": ConfigRecord({"server-round": 1, "layout": "x"}),
        }
    )
    return Message(content, 2, "train")


def served(whole: Message) -> tuple[AnnouncedMessage, dict[str, bytes]]:
    objects = {key: one.deflate() for key, one in get_all_nested_objects(whole).items()}
    return AnnouncedMessage(Message(RecordDict(), 2, "train"), get_object_tree(whole)), objects


def puller(objects: Mapping[str, bytes]) -> Callable[[str, int], bytes]:
    def pull(object_id: str, max_bytes: int) -> bytes:
        content = objects[object_id]
        if len(content) > max_bytes:
            raise OwnerLimit(f"{len(content)} bytes")
        return content

    return pull


def changed(objects: Mapping[str, bytes], kind: str, **fields: Any) -> dict[str, bytes]:
    """The objects with other fields in the description of those of one kind."""
    found = dict(objects)
    for key, content in objects.items():
        head, _, body = content.partition(b"\x00")
        if head.startswith(kind.encode() + b" "):
            described = json.dumps(json.loads(body) | fields).encode()
            name, children, _ = head.split(b" ")
            found[key] = b" ".join((name, children, b"%d" % len(described))) + b"\x00" + described
    return found


def test_a_message_comes_as_it_was_sent() -> None:
    whole = message()
    announced, objects = served(whole)
    content = read_content(announced, puller(objects), limit_bytes=LIMIT_BYTES)
    assert content.object_id == whole.content.object_id
    assert np.array_equal(
        content.array_records["arrays"]["model"].numpy(), np.arange(WEIGHTS, dtype=np.float32)
    )


def test_a_message_that_is_larger_than_it_may_be_is_not_read_on() -> None:
    announced, objects = served(message())
    pulled: list[str] = []

    def pull(object_id: str, max_bytes: int) -> bytes:
        pulled.append(object_id)
        return puller(objects)(object_id, max_bytes)

    with pytest.raises(OwnerLimit, match=r"has more than 8,000,000 bytes"):
        read_content(announced, pull, limit_bytes=8_000_000)
    assert len(pulled) <= 4, "the array says how large it is before its chunks are asked for"


@pytest.mark.parametrize(
    "fields",
    [
        {"arraychunk_ids": [0] * 4000},
        {"arraychunk_ids": [0] * 4000, "shape": [5]},
        {"arraychunk_ids": [0] * 200_000},
        {"shape": [2**62, 2**62]},
        {"shape": [-1]},
        {"shape": [10**4000] * 900},  # which takes half a minute to multiply
        {"shape": [1] * 65},
        {"shape": [True, 1.5]},
        {"dtype": "no such"},
        {"arraychunk_ids": [99]},
        {"arraychunk_ids": "0"},
        {"shape": None},
    ],
)
def test_an_array_that_lies_about_itself_is_refused_before_it_takes_memory(
    fields: dict[str, Any],
) -> None:
    announced, objects = served(message(2_000_000))
    tampered = changed(objects, "Array", **fields)
    tracemalloc.start()
    try:
        with pytest.raises((OwnerLimit, InvalidUpdate)):
            read_content(announced, puller(tampered), limit_bytes=LIMIT_BYTES)
        assert tracemalloc.get_traced_memory()[1] < 4 * LIMIT_BYTES
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x00",
        b"Array",
        b"Message  0\x00",
        b"Nothing a 1\x00x",
        b"\xff\xfe\x00",
        b"Array  9\x00[]",
    ],
)
def test_objects_that_are_none_are_refused(content: bytes) -> None:
    announced, objects = served(message(4))
    for each in objects:
        with pytest.raises(InvalidUpdate, match="cannot read"):
            read_content(announced, puller(objects | {each: content}), limit_bytes=LIMIT_BYTES)


def test_what_is_no_array_is_small() -> None:
    """A list of empty strings takes sixty times as much once it is parsed."""
    announced, objects = served(message(4))
    (name,) = (key for key, content in objects.items() if content.startswith(b"ConfigRecord"))
    body = objects[name].partition(b"\x00")[2] + b"\x00" * MAX_PLAIN_BYTES
    content = b"ConfigRecord  %d\x00" % len(body) + body
    with pytest.raises((InvalidUpdate, OwnerLimit)) as refused:
        read_content(announced, puller(objects | {name: content}), limit_bytes=1 << 30)
    assert "a ConfigRecord of 16,777" in str(refused.value)


@pytest.mark.parametrize(
    ("told", "waits_s"),
    [
        ("nan", 1.0),
        ("inf", 1.0),
        ("-inf", 1.0),
        ("soon", 1.0),
        ("0", 0.05),
        ("7", 7.0),
        ("1e9", 60.0),
    ],
)
def test_a_busy_server_is_asked_again_in_a_while(told: str, waits_s: float) -> None:
    response = httpx.Response(503, headers={"retry-after": told})
    assert fleet_errors._retry_after_s(response) == waits_s


def test_an_error_is_no_message_that_a_device_is_sent() -> None:
    announced, objects = served(Message(Error(1, "no"), reply_to=message(4)))
    with pytest.raises(InvalidUpdate, match="expected a Message"):
        read_content(announced, puller(objects), limit_bytes=LIMIT_BYTES)


def test_a_tree_of_very_many_objects_is_refused_before_one_is_fetched() -> None:
    tree = ObjectTree(children=[ObjectTree(object_id=str(each)) for each in range(5000)])
    announced = AnnouncedMessage(Message(RecordDict(), 2, "train"), tree)
    with pytest.raises(InvalidUpdate, match="more than 4096 objects"):
        read_content(announced, lambda *_: pytest.fail("fetched"), limit_bytes=LIMIT_BYTES)


class Endless(httpx.SyncByteStream):
    """A body without an end."""

    def __init__(self) -> None:
        self.sent = 0

    def __iter__(self) -> Iterator[bytes]:
        while True:
            self.sent += 65_536
            yield bytes(65_536)


def answer(stream: httpx.SyncByteStream, **headers: str) -> httpx.Response:
    return httpx.Response(
        200,
        headers={key.replace("_", "-"): value for key, value in headers.items()},
        stream=stream,
        request=httpx.Request("POST", "https://server"),
    )


@pytest.mark.parametrize("declared", ["6442450944", "9" * 5000])
def test_an_answer_that_declares_too_much_is_not_begun(declared: str) -> None:
    body = Endless()
    with pytest.raises(TooLarge, match="declared"):
        read_bounded(answer(body, content_length=declared), 1000)
    assert body.sent == 0


def test_an_answer_that_goes_on_is_read_no_further_than_it_may_be() -> None:
    body = Endless()
    with pytest.raises(TooLarge, match="were received"):
        read_bounded(answer(body, content_length="-7"), 1_000_000)
    assert body.sent < 1_200_000


def test_an_answer_that_is_compressed_is_refused() -> None:
    body = Endless()
    with pytest.raises(ValueError, match="compressed"):
        read_bounded(answer(body, content_encoding="gzip"), 1000)
    assert body.sent == 0


def client(respond: Callable[[httpx.Request], httpx.Response]) -> BoundedClient:
    made = bounded("https://server", ssl.create_default_context())
    made._client = httpx.Client(transport=httpx.MockTransport(respond))
    return made


def test_a_client_reads_small_answers_and_objects_by_limits_of_their_own() -> None:
    content = bytes(2 * ANSWER_BYTES)
    body = PullObjectResponse(
        object_found=True, object_available=True, object_content=content
    ).SerializeToString()
    seen: list[str] = []

    def respond(request: httpx.Request) -> httpx.Response:
        seen.append(request.headers["accept-encoding"])
        return httpx.Response(200, stream=httpx.ByteStream(body))

    link = client(respond)
    found = link.pull_object(PullObjectRequest(), 3 * ANSWER_BYTES)
    assert bytes(found.object_content) == content
    with pytest.raises(OwnerLimit, match="an object in the server's message is too large"):
        link.pull_object(PullObjectRequest(), ANSWER_BYTES)
    with pytest.raises(TooLarge):
        link.PullMessages(PullMessagesRequest())
    assert set(seen) == {"identity"}


def test_a_client_follows_nobody_elsewhere() -> None:
    asked: list[str] = []

    def respond(request: httpx.Request) -> httpx.Response:
        asked.append(str(request.url))
        headers = {"location": "https://elsewhere/"}
        return httpx.Response(307, headers=headers, stream=httpx.ByteStream(b""))

    with pytest.raises(httpx.HTTPStatusError):
        client(respond).PullMessages(PullMessagesRequest())
    assert len(asked) == 1
