"""Large chunks over the network: slow, broken off, forged, twice at once; the update is whole."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest
from flwr.proto.fleet_pb2 import PushMessagesResponse
from flwr.proto.message_pb2 import PushObjectRequest, PushObjectResponse
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects

from fedcore.updates.messages import weights_record
from fedcore.updates.pieces import CutFileArray
from server.live.network.limits import Limits

FLEET = "/v1/fleet"
VALUES = np.random.default_rng(0).random(200_000, np.float32)


class Update:
    """A reply with a large array that was announced, and its objects as requests."""

    def __init__(self, one: Any) -> None:
        self.one = one
        reply = one.reply(loss=0.5)
        reply.content["arrays"] = weights_record(VALUES)
        one.sign(reply)
        begun = PushMessagesResponse.FromString(one.push(reply).content)
        self.requests = {
            object_id: PushObjectRequest(
                node=one.node,
                run_id=reply.metadata.run_id,
                object_id=object_id,
                object_content=found.deflate(),
                session_id=begun.session_id,
            )
            for object_id, found in get_all_nested_objects(reply).items()
        }

    @property
    def chunk(self) -> PushObjectRequest:
        return max(self.requests.values(), key=lambda each: len(each.object_content))

    def send(self, raw: bytes, *, pieces: int = 1, pause_s: float = 0.0) -> httpx.Response:
        step = len(raw) // pieces + 1

        def body() -> Iterator[bytes]:
            for place in range(0, len(raw), step):
                yield raw[place : place + step]
                time.sleep(pause_s)

        return self.one.client.post(  # type: ignore[no-any-return]
            f"{FLEET}/push-object", content=body(), headers=self.one.headers
        )

    def stored(self, response: httpx.Response) -> bool:
        assert response.status_code == 200, response.text
        return bool(PushObjectResponse.FromString(response.content).stored)

    def send_whole(self) -> None:
        for each in self.requests.values():
            assert self.stored(self.send(each.SerializeToString()))


@pytest.fixture
def served(serve: Any) -> Iterator[Any]:
    with serve(limits=Limits(body_s=1.0)) as one:
        yield one


@pytest.fixture
def begun(served: Any, rogue: Any, ask: Any) -> Iterator[Update]:
    """An update; afterwards it must be taken, whatever was tried before."""
    one = rogue()
    thread, answers = ask(served, one.activate())
    update = Update(one)
    yield update
    update.send_whole()
    thread.join(10)
    (answer,) = answers
    array = answer.content["arrays"]["model"]
    assert isinstance(array, CutFileArray)
    assert array.data[128:] == VALUES.tobytes()


def test_one_that_comes_as_it_should(begun: Update) -> None:
    assert begun.chunk


@pytest.mark.parametrize("pieces", [2, 300])
def test_one_that_comes_in_pieces(begun: Update, pieces: int) -> None:
    chunk = begun.chunk
    assert begun.stored(begun.send(chunk.SerializeToString(), pieces=pieces))
    del begun.requests[chunk.object_id]


def test_one_that_is_another_than_announced(begun: Update) -> None:
    forged = PushObjectRequest()
    forged.CopyFrom(begun.chunk)
    forged.object_content = forged.object_content[:-1] + b"!"
    for pieces in (1, 7):
        assert not begun.stored(begun.send(forged.SerializeToString(), pieces=pieces))


def test_one_that_never_comes_to_its_end(begun: Update, served: Any) -> None:
    raw = begun.chunk.SerializeToString()
    assert begun.send(raw, pieces=4, pause_s=0.6).status_code == 408
    assert not any(asked.arriving for asked in served.listening.fleet.pending.values())


def test_one_whose_sender_hangs_up(begun: Update, served: Any, rogue: Any) -> None:
    raw = begun.chunk.SerializeToString()
    other = rogue()

    def broken() -> Iterator[bytes]:
        yield raw[:300_000]
        time.sleep(0.1)
        raise KeyError

    with pytest.raises(KeyError):
        other.client.post(f"{FLEET}/push-object", content=broken(), headers=other.headers)
    other.client.close()
    end = time.monotonic() + 5
    while any(asked.arriving for asked in served.listening.fleet.pending.values()):
        assert time.monotonic() < end, "what was broken off still has its place"
        time.sleep(0.01)


def test_two_at_once_of_which_the_earlier_is_refused(begun: Update, rogue: Any) -> None:
    raw, other = begun.chunk.SerializeToString(), rogue()
    slow = Update.__new__(Update)
    slow.one = other
    codes: list[int] = []
    thread = threading.Thread(
        target=lambda: codes.append(slow.send(raw, pieces=5, pause_s=0.15).status_code)
    )
    thread.start()
    time.sleep(0.25)
    assert begun.stored(begun.send(raw))
    thread.join()
    assert codes == [409]
    del begun.requests[begun.chunk.object_id]


def test_what_follows_a_chunk_and_is_no_request(begun: Update) -> None:
    raw = begun.chunk.SerializeToString()
    assert begun.send(raw + bytes(3000)).status_code == 400
    assert begun.send(raw[:-100], pieces=3).status_code == 400
