"""Whole replies, from the objects that a device pushes to the update that is believed."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from flwr.app import Array, ConfigRecord, Error, Message, RecordDict

from fedcore.config.run import RunConfig
from fedcore.errors import InvalidUpdate, ResourceError
from fedcore.flower.fleet_payload import read_message
from fedcore.flower.fleet_store import FleetStore
from fedcore.flower.identity import assume_identity
from fedcore.task.metrics import ACCURACY, RMSE, Metric
from fedcore.updates.evaluation import UNDEFINED
from fedcore.updates.messages import REFUSED
from fedcore.updates.pack import Layout
from fedcore.updates.pieces import CutFile
from fedcore.updates.replies import ReplySpec, check_structure, read_reply
from fedcore.updates.seal import base_digest, content_digest, sign_reply, verify_reply
from server.rounds.expected import evaluation_spec, sums_spec, update_spec
from server.rounds.inbound import failure_of
from tests.fuzz.mutate import NUMBERS, TEXTS, packed, unpacked
from tests.fuzz.project import member_keys
from tests.fuzz.wire import array, objects, odd_content, read_objects

SIZE = 5
LIMIT_BYTES = 1 << 20
_NOW_S = 1_800_000_000.0
_LAYOUT = Layout(("weight",), ((SIZE,),))


@cache
def questions() -> tuple[ReplySpec, ...]:
    plain = {"name": "run", "task": "task.py"}
    both = plain | {"privacy": {"unit": "both", "client": {"clip_norm": 1.0}}}
    return (
        update_spec(RunConfig.model_validate(plain), _LAYOUT),
        update_spec(RunConfig.model_validate(both), _LAYOUT),
        evaluation_spec([ACCURACY, RMSE, Metric("bias", lambda *_: 0.0, False)], (2,)),
        sums_spec((2, 3)),
    )


class _Store(FleetStore):
    """Objects that came, without a server around them."""

    def __init__(self, held: dict[str, bytes]) -> None:
        self.held = held
        self.folder = Path("nowhere")

    def get(self, object_id: str) -> bytes | None:
        return self.held.get(object_id)

    def small(self, object_id: str) -> bytes:
        return self.held[object_id]

    def joined(self, chunks: Sequence[str], own: Collection[CutFile]) -> CutFile | None:
        return None

    def scratch(self) -> Any:
        raise AssertionError("no input has so large an array")


def make(rng: Random) -> bytes:
    """A reply to one of the questions: an honest one, of which some parts are made up."""
    assume_identity(1)
    number = rng.randrange(4)
    asked = questions()[number]
    signed = rng.randrange(10) == 0
    if rng.randrange(20) == 0:
        code = rng.choice((0, 1001, 1100, 1107, 2**40, -5))
        text = rng.choice((*TEXTS, "spent \x1b]0;x\x07 \u202e" + "A" * 10_000))
        reason = text.encode(errors="ignore").decode(errors="ignore")
        return packed([bytes((number, 0)), objects(rng, Error(code, reason))])
    metrics: dict[str, Any] = {"num-examples": 3} | dict.fromkeys(asked.metrics, 0.5)
    if rng.randrange(8) == 0:
        value = rng.choice(NUMBERS)
        fits = isinstance(value, float) or -(2**63) <= value < 2**63
        metrics[rng.choice([*metrics])] = value if fits else float(value)
    content: dict[str, dict[str, Any]] = {"metrics": metrics}
    forms = asked.forms(())
    if forms:
        content["arrays"] = {
            name: array(rng, SIZE)
            if number < 2 and rng.randrange(4) == 0
            else Array(np.full(form.shape, 0.5, form.dtype))
            for name, form in forms.items()
        }
    if asked.every_metric and rng.randrange(4) == 0:
        name = rng.choice([*sorted(asked.optional), "x"])
        content[UNDEFINED] = {name: rng.choice((b"why", b"\xff", "", 3))}
    made = odd_content(rng, content, SIZE)
    if signed:
        _sign(rng, made, asked)
    return packed([bytes((number, signed)), objects(rng, made)])


def _asked(asked: ReplySpec) -> Message:
    return Message(RecordDict(), 7, asked.purpose)


def _sign(rng: Random, content: RecordDict, asked: ReplySpec) -> None:
    sign_reply(
        content,
        RecordDict(),
        purpose=asked.purpose,
        run_id="c" * 64,
        node_id=7,
        key=member_keys()[0],
        now_s=_NOW_S,
    )
    if rng.randrange(4) == 0:
        record = content["envelope"]
        assert isinstance(record, ConfigRecord)
        record["envelope"] = rng.choice((b"", b"\0" * 600, "text", 3, [1, 2], 0.5))


def read(raw: bytes) -> None:
    """As a live server takes it in: payload, legibility, signature, content."""
    assume_identity(1)
    (number, signed), pushed = unpacked(raw)
    asked, (held, tree) = questions()[number], read_objects(pushed)
    try:
        content, error = read_message(_Store(held), tree, limit_bytes=LIMIT_BYTES)
    except ResourceError:
        raise
    except Exception as failure:  # as `Fleet.take` does, whose answer is an error of the node's
        content, error = None, Error(REFUSED, f"cannot read it ({type(failure).__name__})")
    if error is not None:
        code, reason = failure_of(Message(error, reply_to=_asked(asked)))
        assert reason.isprintable()
        raise InvalidUpdate(f"client 'edge-0' failed ({code}): {reason}"[:2000])
    assert content is not None
    where = "round 3: reply from 'edge-0'"
    check_structure(content, where=where)
    content_digest(content)
    if signed:
        base = base_digest(RecordDict())
        verify_reply(
            content,
            purpose=asked.purpose,
            run_id="c" * 64,
            round=0,
            node_id=7,
            base_sha256=base,
            public_key=_public(),
            now_s=_NOW_S,
        )
    reply = Message(content, reply_to=_asked(asked))
    found = read_reply(
        reply, asked, where=where, base=np.zeros(SIZE, np.float32) if number < 2 else None
    )
    assert found.metrics.keys() <= asked.metrics.keys()
    assert found.undefined.keys() <= asked.optional
    assert all(why.isprintable() for why in found.undefined.values())
    for name, form in asked.forms(found.undefined).items():
        values = found.values(name)
        assert (str(values.dtype), values.shape) == (form.dtype, form.shape)
        assert np.isfinite(values).all()


@cache
def _public() -> bytes:
    from fedcore.crypto.keys import public_bytes

    return public_bytes(member_keys()[0])
