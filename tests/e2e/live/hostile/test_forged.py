"""Updates that are not what they claim, by the thousand, over live TLS: none is ever used.

``FEDCORE_HOSTILE`` is how many of each class are sent; the campaign sends 1300.
"""

from __future__ import annotations

import os
import random
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import httpx
import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Message,
    MessageType,
    MetricRecord,
    RecordDict,
)

from fedcore.crypto.keys import new_key
from fedcore.updates.messages import weights_record
from fedcore.updates.replies import ArraySpec, Range, ReplySpec
from server.live.network.limits import Limits
from server.rounds.inbound import Intake, Tally, accepted

COUNT = int(os.environ.get("FEDCORE_HOSTILE", "40"))
"""Of each class."""
PATIENCE_S = 60.0 + COUNT
"""How long a round may take, and all of a class."""
pytestmark = pytest.mark.timeout(300 + COUNT)
BATCH = 8
SIZE = 7
INTAKE = Intake(
    ReplySpec("train", {"train_loss": Range()}, {"model": ArraySpec("float32", (SIZE,))})
)
WIDE = Limits(calls_per_s=1e6, burst=10**6)

Forge = Callable[[Any, Message, RecordDict, random.Random], None]


def instruction(number: int) -> RecordDict:
    weights = np.full(SIZE, number, np.float32)
    return RecordDict(
        {
            "arrays": weights_record(weights),
            "config": ConfigRecord({"server-round": number, "layout": "", "preprocess": b""}),
        }
    )


def update() -> RecordDict:
    return RecordDict(
        {
            "arrays": weights_record(np.ones(SIZE, np.float32)),
            "metrics": MetricRecord({"num-examples": 5, "train_loss": 0.5}),
        }
    )


def changed(rng: random.Random, raw: bytes) -> bytes:
    place = rng.randrange(len(raw))
    return raw[:place] + bytes((raw[place] ^ 1 << rng.randrange(8),)) + raw[place + 1 :]


def unsigned(one: Any, reply: Message, asked: RecordDict, rng: random.Random) -> None:
    if rng.random() < 0.5:
        reply.content["envelope"] = ConfigRecord({"envelope": rng.randbytes(rng.randrange(400))})


def forged(one: Any, reply: Message, asked: RecordDict, rng: random.Random) -> None:
    """Signed by another key, or with a bit changed, or over other records than these."""
    kind = rng.randrange(3)
    one.sign(reply, asked, **({"key": FOREIGN_KEY} if kind == 0 else {}))
    if kind == 1:
        raw = reply.content["envelope"]["envelope"]
        reply.content["envelope"] = ConfigRecord({"envelope": changed(rng, raw)})
    if kind == 2:
        reply.content["metrics"]["train_loss"] = rng.random()


def cross_node(one: Any, reply: Message, asked: RecordDict, rng: random.Random) -> None:
    """Signed for another node, by this one's key or by that node's own."""
    other = {"node_id": rng.getrandbits(62) | 2}
    one.sign(reply, asked, **other, **({"key": FOREIGN_KEY} if rng.random() < 0.5 else {}))


def stale(one: Any, reply: Message, asked: RecordDict, rng: random.Random) -> None:
    """Signed for another round, base, run or purpose, or for a time that has passed."""
    other = [
        {"asked": instruction(rng.randrange(1000, 2000))},
        {"run_id": "another run"},
        {"purpose": "evaluate"},
        {"now_s": time.time() - 40 * 3600},
        {"now_s": time.time() + 30 * 86400},
    ][rng.randrange(5)]
    one.sign(reply, **({"asked": asked} | other))


def malformed(one: Any, reply: Message, asked: RecordDict, rng: random.Random) -> None:
    """Soundly signed, and no update: wrong shape, dtype, records, values or numbers."""
    content = reply.content
    bad: list[Any] = [
        np.ones(SIZE + 1, np.float32),
        np.ones((SIZE, 1), np.float32),
        np.ones(SIZE, np.float64),
        np.full(SIZE, np.nan, np.float32),
        np.full(SIZE, -np.inf, np.float32),
        np.zeros(0, np.float32),
    ]
    kind = rng.randrange(10)
    if kind < len(bad):
        content["arrays"] = ArrayRecord({"model": Array(bad[kind])})
    elif kind == 6:
        content["arrays"] = ArrayRecord(
            {"model": Array("float32", (SIZE,), "numpy.ndarray", rng.randbytes(200))}
        )
    elif kind == 7:
        del content[rng.choice(["arrays", "metrics"])]
    elif kind == 8:
        content["arrays"] = ArrayRecord({"other": Array(np.ones(SIZE, np.float32))})
    else:
        content["metrics"]["train_loss"] = rng.choice([float("nan"), float("inf")])
    one.sign(reply, asked)


def not_asked_for(one: Any, reply: Message, asked: RecordDict, rng: random.Random) -> None:
    """A whole update, and more than was asked for; names that no text holds; another message."""
    content, kind = reply.content, rng.randrange(9)
    arrays, metrics = content["arrays"], content["metrics"]
    extra = Array(np.ones(SIZE, np.float32))
    if kind == 0:
        metrics.update({f"metric {place}": 1.0 for place in range(3000)})
    elif kind == 1:
        arrays.update({f"array {place}": extra for place in range(300)})
    elif kind == 2:
        metrics["train_loss"] = rng.choice([1.7e308, -1e300, 1e19])
    elif kind == 3:
        metrics["\x1b]0;title\x07\n2026-01-01 INFO forged"] = 1.0
    elif kind == 4:
        content["more"] = ConfigRecord({"a": b"x" * 10_000})
    elif kind == 5:
        metrics["train_loss"] = [0.5] * 100
    if kind < 6:
        one.sign(reply, asked)
        return
    if kind == 6:
        one.sign(reply, asked)
        reply.metadata.__dict__["_message_type"] = rng.choice(["evaluate", "query.x"])
        return
    if kind == 7:
        arrays["a\ud800"] = extra
    else:
        extra.dtype = "a\ud800"
        arrays["model"] = extra
    content["envelope"] = ConfigRecord({"envelope": b"no text of this can be signed"})


FOREIGN_KEY: EllipticCurvePrivateKey = new_key()
CLASSES: dict[str, Forge] = {
    forge.__name__: forge
    for forge in (unsigned, forged, cross_node, stale, malformed, not_asked_for)
}


@dataclass
class Round:
    """A round that a test asks of its rogues, and what the server made of their replies."""

    served: Any
    number: int = 0

    def begin(self, rogues: list[Any]) -> tuple[threading.Thread, Tally, list[int], RecordDict]:
        self.number += 1
        content, tally, taken = instruction(self.number), Tally(len(rogues)), list[int]()
        messages = [
            Message(content, one.node.node_id, MessageType.TRAIN, group_id=str(self.number))
            for one in rogues
        ]
        grid = self.served.listening.grid()

        def collect() -> None:
            replies = grid.send_and_receive_batches(messages, timeout=PATIENCE_S)
            for reply, found in accepted(replies, INTAKE, tally, first=len(rogues)):
                assert np.isfinite(found.update().weights).all()
                taken.append(reply.metadata.src_node_id)

        thread = threading.Thread(target=collect)
        thread.start()
        while len(self.served.listening.fleet.pending) < len(rogues):
            time.sleep(0.002)
        return thread, tally, taken, content


@pytest.fixture
def served(serve: Any) -> Iterator[Any]:
    with serve(limits=WIDE) as served:
        yield served


@pytest.mark.parametrize("name", sorted(CLASSES))
def test_none_of_a_class_is_used_and_an_honest_one_beside_it_is(
    served: Any, rogue: Any, sent: Any, name: str
) -> None:
    rng, rounds, forge = random.Random(name), Round(served), CLASSES[name]
    rogues = [rogue(f"edge-{place}") for place in range(BATCH + 1)]
    for one in rogues:
        one.activate()
    honest = rogues[-1]
    while sent.number < COUNT:
        thread, tally, taken, content = rounds.begin(rogues)
        for one in rogues:
            asked = one.asked()
            reply = Message(update(), reply_to=asked)
            if one is honest:
                one.sign(reply, content)
            else:
                forge(one, reply, content, rng)
                sent.one()
            codes = one.push_whole(reply)
            assert set(codes) == {200}, "it is well-formed, and refused by what it holds"
        thread.join(PATIENCE_S)
        assert taken == [honest.node.node_id]
        assert (tally.updates, tally.failed, tally.declined) == (0, BATCH, 0), tally.reasons


def test_what_was_sent_before_is_not_taken_again(served: Any, rogue: Any, sent: Any) -> None:
    """An old reply to the same message, its envelope in a new reply, and twice to one message."""
    rounds, one = Round(served), rogue()
    one.activate()
    recorded: list[Message] = []
    for _ in range(1 + COUNT // 3):
        thread, tally, taken, content = rounds.begin([one])
        asked = one.asked()
        for old in recorded[-1:]:
            assert one.push(old).status_code == 409, "its message was answered"
            sent.one()
            again = Message(RecordDict(dict(old.content)), reply_to=asked)
            assert set(one.push_whole(again)) == {200}
            thread.join(PATIENCE_S)
            assert taken == []
            assert tally.failed == 1
            sent.one()
            thread, tally, taken, content = rounds.begin([one])
            asked = one.asked()
        reply = Message(update(), reply_to=asked)
        one.sign(reply, content)
        assert set(one.push_whole(reply)) == {200}
        thread.join(PATIENCE_S)
        assert taken == [one.node.node_id]
        assert one.push(reply).status_code == 409, "a duplicate"
        sent.one()
        recorded.append(reply)


def test_garbage_on_the_wire_is_refused(served: Any, rogue: Any, sent: Any) -> None:
    """Random bytes, and true requests with bytes changed, at every call."""
    rng, rounds, one = random.Random(3), Round(served), rogue()
    one.activate()
    thread, _, taken, content = rounds.begin([one])
    reply = Message(update(), reply_to=one.asked())
    one.sign(reply, content)
    calls = ("pull-messages", "push-messages", "push-object", "pull-object", "get-run")
    codes = set()
    for _ in range(COUNT):
        raw = rng.randbytes(rng.randrange(1, 300))
        response = one.post(f"/v1/fleet/{rng.choice(calls)}", raw)
        codes.add(response.status_code)
        sent.one()
    assert codes <= {400, 403, 409}
    assert set(one.push_whole(reply)) == {200}
    thread.join(PATIENCE_S)
    assert taken == [one.node.node_id], "and the round went on"


def test_without_a_members_certificate_nothing_is_heard(
    project: Any, served: Any, rogue: Any, sent: Any, tmp_path: Any
) -> None:
    """No certificate, one of another authority, and one that was revoked."""
    rounds, one = Round(served), rogue()
    one.activate()
    thread, _, taken, content = rounds.begin([one])
    reply = Message(update(), reply_to=one.asked())
    one.sign(reply, content)
    url = f"https://127.0.0.1:{project.port}"
    bare = ssl.create_default_context(cadata=project.server().kit.authority_pem.decode())
    other = type(project)(tmp_path / "other", port=project.port)
    foreign_kit = other.device("edge-0")
    foreign = ssl.create_default_context(cadata=project.server().kit.authority_pem.decode())
    foreign.load_cert_chain(_pem(tmp_path, foreign_kit.certificate_pem), foreign_kit.key_path)
    revoked = rogue("edge-3")
    project.revoke("edge-3")
    for number in range(COUNT):
        sent.one()
        if number % 3 == 0:
            assert revoked.push(reply).status_code == 403
            continue
        context = bare if number % 3 == 1 else foreign
        with (
            httpx.Client(verify=context, base_url=url) as client,
            pytest.raises(httpx.TransportError),
        ):
            client.post("/v1/fleet/push-messages", content=b"x" * 1000).raise_for_status()
    assert set(one.push_whole(reply)) == {200}
    thread.join(PATIENCE_S)
    assert taken == [one.node.node_id]


def _pem(folder: Any, raw: bytes) -> Any:
    path = folder / "certificate.pem"
    path.write_bytes(raw)
    return path


def test_a_chunk_that_is_repeated_does_not_fill_the_memory(served: Any, rogue: Any) -> None:
    """200 kB that are announced as an array of 800 MB."""
    rounds, one = Round(served), rogue()
    one.activate()
    thread, tally, taken, content = rounds.begin([one])
    reply = Message(update(), reply_to=one.asked())
    reply.content["arrays"] = ArrayRecord({"model": Array(np.ones(50_000, np.float32))})
    one.sign(reply, content)
    array: Any = reply.content["arrays"]["model"]
    array.__dict__["_chunks"] = array.slice_array() * 4000
    assert set(one.push_whole(reply)) == {200}
    thread.join(PATIENCE_S)
    assert taken == []
    assert "more bytes than an update may have" in tally.reasons[0]


def test_a_client_weighs_what_it_enrolled_with(project: Any, served: Any, rogue: Any) -> None:
    """Whatever number of examples it claims; where one has committed to none, all are equal."""
    rounds, rogues = Round(served), [rogue(f"edge-{place}") for place in range(3)]
    for one in rogues:
        one.activate()
    for committed, expected in (
        ({}, [1, 1, 1]),
        ({"edge-0": 40, "edge-1": 7}, [1, 1, 1]),
        ({"edge-0": 40, "edge-1": 7, "edge-2": 9}, [7, 9, 40]),
    ):
        for name, weight in committed.items():
            entry = project.members[name]
            project.members[name] = entry.model_copy(update={"num_examples": weight})
        project.write_roster()
        content = instruction(rounds.number + 1)
        rounds.number += 1
        grid, found = served.listening.grid(), list[int]()
        messages = [Message(content, one.node.node_id, MessageType.TRAIN) for one in rogues]

        def collect(messages: Any = messages, grid: Any = grid, found: Any = found) -> None:
            replies = grid.send_and_receive_batches(messages, timeout=PATIENCE_S)
            tally = Tally(len(messages))
            weights = served.listening.peers.weights([one.node.node_id for one in rogues])
            intake = replace(INTAKE, weights=weights)
            for _, update in accepted(replies, intake, tally, first=len(messages)):
                found.append(update.num_examples)

        thread = threading.Thread(target=collect)
        thread.start()
        while len(served.listening.fleet.pending) < len(rogues):
            time.sleep(0.002)
        for one in rogues:
            reply = Message(update(), reply_to=one.asked())
            reply.content["metrics"]["num-examples"] = 2**30
            one.sign(reply, content)
            one.push_whole(reply)
        thread.join(PATIENCE_S)
        assert sorted(found) == expected
