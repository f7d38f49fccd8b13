"""Messages as they travel: objects that name each other by their digests.

An input is the objects of one message, each before those that refer to it, the message last.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Sequence
from functools import cache
from random import Random
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.proto.error_pb2 import Error as ErrorProto
from flwr.proto.message_pb2 import Message as ProtoMessage
from flwr.proto.message_pb2 import ObjectTree

from tests.fuzz.mutate import NUMBERS, TEXTS, damaged, damaged_json, packed, unpacked

WORDS = ("float32", "float64", "int64", "object", "O", "numpy.ndarray", "model", "0", "sum")
NAMES = (
    *("arrays", "metrics", "config", "model", "num-examples", "train_loss", "epsilon", "envelope"),
    *("accuracy", "rmse", "sum", "squares", "unclipped", "server-round", "layout", "preprocess"),
    *("proximal-mu", "clip-norm", "\x1b[2J", "a\nb", "\u202e", "", "x" * 200, "n" * 5000, "naïve"),
)

_MAX_BYTES = 300_000
"""Of one object."""
_SHAPES = ("1099511627776,", "-1,", "9" * 900 + ",", "1," * 60, "", "True,", "0, 5", "2**62, 4")
_TYPES = ("'<f4'", "'|V0'", "'|O'", "'<f4,<f4'", "[('a', '<f4')]", "'<U9'", "'M8'", "None", "5")


def array_bytes(rng: Random, size: int) -> bytes:
    """What an array's chunk holds: NumPy's format, nearly."""
    values = np.full(size, 0.5, np.float32)
    kind = rng.randrange(16)
    if kind == 0:
        values[rng.randrange(size)] = rng.choice((np.nan, np.inf, 3e38, -3e38, 1e-45))
    made = {
        1: values.astype(">f4"),
        2: values.astype(np.float64),
        3: values[:-1],
        4: values.reshape(1, -1),
        5: np.asfortranarray(np.tile(values, (2, 1))),
        6: np.full((2, 3), 0.5),
        7: values.astype(np.complex64),
    }.get(kind, values)
    stream = io.BytesIO()
    np.lib.format.write_array(
        stream, made, version=(2, 0) if kind == 8 else (1, 0), allow_pickle=False
    )
    raw = stream.getvalue()
    if kind == 9:
        shape = rng.choice(
            ("1099511627776,", "-1,", "9" * 900 + ",", "1," * 60, "", "True,", "0, 5")
        )
        descr = rng.choice(
            ("'<f4'", "'|V0'", "'|O'", "'<f4,<f4'", "[('a', '<f4')]", "'<U9'", "'M8'")
        )
        head = f"{{'descr': {descr}, 'fortran_order': False, 'shape': ({shape}), }}\n".encode()
        raw = b"\x93NUMPY\x02\x00" + len(head).to_bytes(4, "little") + head + raw[128:]
    if kind == 10:
        head = rng.choice((b"[" * 5000, b"-" * 9000 + b"1", b"{" * 900, b"\xff" * 50, b"(" * 9000))
        raw = b"\x93NUMPY\x02\x00" + len(head).to_bytes(4, "little") + head
    return damaged(rng, raw) if kind == 11 else raw


def odd_value(rng: Random) -> Any:
    """Of a metric or a setting, as far as Flower has a place for it."""
    value = rng.choice((*NUMBERS, float("nan"), float("inf"), 3, 0.5, b"\0", b"x" * 9000, True))
    if isinstance(value, int) and not isinstance(value, bool) and not -(2**63) <= value < 2**63:
        value = 2**63 - 1
    if rng.randrange(6) == 0:
        value = rng.choice((TEXTS[0], "\x1b[2J", "x" * 5000, "12", "nan", "1e999", "9" * 5000))
    return [value] * rng.choice((1, 3, 3000)) if rng.randrange(12) == 0 else value


def record(values: dict[str, Any]) -> Any:
    """The record that takes these values; one of settings where no other does."""
    flat = [
        one for value in values.values() for one in (value if isinstance(value, list) else [value])
    ]
    if any(isinstance(one, bytes | str | bool) for one in flat) or len({*map(type, flat)}) > 2:
        return ConfigRecord(values)
    return MetricRecord(values)


def array(rng: Random, size: int) -> Array:
    """An array whose description is right; `objects` may change that."""
    return Array("float32", (size,), "numpy.ndarray", array_bytes(rng, size))


def odd_content(rng: Random, content: dict[str, dict[str, Any]], size: int) -> RecordDict:
    """Records of which some are gone, under another name, or hold what they should not."""
    for _ in range(rng.choice((0, 0, 1, 1, 2, 3))):
        name = rng.choice([*content]) if content else rng.choice(NAMES)
        kind = rng.randrange(9)
        held = content.setdefault(name, {})
        if kind == 0:
            del content[name]
        elif kind == 1:
            content[rng.choice(NAMES)] = content.pop(name)
        elif kind == 2:
            content[rng.choice(NAMES)] = {rng.choice(NAMES): odd_value(rng)}
        elif kind == 3 and held:
            held.pop(rng.choice([*held]))
        elif kind == 4:
            held.update({f"m{number}": 1.0 for number in range(rng.choice((2, 30, 257)))})
        elif kind == 5:
            content[rng.choice(NAMES)] = {rng.choice(NAMES): array(rng, size)}
        elif held and not isinstance(next(iter(held.values())), Array):
            held[rng.choice((*held, *NAMES))] = odd_value(rng)
    made = RecordDict()
    for name, values in content.items():
        if values and all(isinstance(one, Array) for one in values.values()):
            made[name] = ArrayRecord(values)
        else:
            made[name] = record(
                {key: one for key, one in values.items() if not isinstance(one, Array)}
            )
    return made


def objects(rng: Random, content: RecordDict | Error) -> bytes:
    """The objects of a message, of which one or two are not what they should be."""
    parts, wrong = list[bytes](), {rng.randrange(4) for _ in range(rng.choice((0, 0, 1, 1, 2)))}
    known = list[str]()

    def add(kind: bytes, children: Sequence[str], body: bytes) -> str:
        head = b"%s %s %d" % (kind, ",".join(children).encode(), len(body))
        if len(parts) in wrong:
            head, body = _odd_object(rng, head, body, known)
        raw = head + b"\0" + body
        if len(parts) in wrong and rng.randrange(6) == 0:
            raw = damaged(rng, raw)
        raw = raw[:_MAX_BYTES]
        parts.append(raw)
        known.append(hashlib.sha256(raw).hexdigest())
        return known[-1]

    def add_array(one: Array) -> str:
        chunk = add(b"ArrayChunk", [], one.data)
        described = {"dtype": one.dtype, "shape": one.shape, "stype": one.stype}
        body = json.dumps(described | {"arraychunk_ids": [0]}).encode()
        return add(b"Array", [chunk], body)

    def add_record(one: Any) -> str:
        if not isinstance(one, ArrayRecord):
            head, _, body = one.deflate().partition(b"\0")
            return add(head.split(b" ")[0], [], body)
        places = {name: add_array(each) for name, each in one.items()}
        return add(b"ArrayRecord", [*places.values()], json.dumps(places).encode())

    body = _message_body(not isinstance(content, RecordDict))
    if isinstance(content, RecordDict):
        places = {name: add_record(one) for name, one in content.items()}
        records = add(b"RecordDict", [*places.values()], json.dumps(places).encode())
        add(b"Message", [records], body)
    else:
        error = ErrorProto(code=content.code, reason=content.reason)
        add(b"Message", [], ProtoMessage(error=error).SerializeToString() + body)
    return packed(parts)


@cache
def _message_body(is_error: bool) -> bytes:
    """What a message says of itself; nobody believes it."""
    asked = Message(RecordDict(), 7, "train")
    reply = Message(Error(1) if is_error else RecordDict(), reply_to=asked)
    found = ProtoMessage.FromString(reply.deflate().partition(b"\0")[2])
    found.ClearField("error")
    return found.SerializeToString()


def _odd_object(rng: Random, head: bytes, body: bytes, known: Sequence[str]) -> tuple[bytes, bytes]:
    kind, children, length = head.split(b" ")
    choice = rng.randrange(8)
    if choice < 4 and kind in (b"Array", b"ArrayRecord", b"RecordDict"):
        body = damaged_json(rng, body, (*WORDS, *NAMES[:16], *known))
    elif choice < 5:
        body = damaged(rng, body)
    elif choice == 5:
        kind = rng.choice((b"Array", b"ArrayChunk", b"RecordDict", b"Message", b"x", b"\xff", b""))
    elif choice == 6:
        more = [one.encode() for one in known]
        some = [*children.split(b","), *(rng.choice(more or [b"0" * 64]) for _ in range(2))]
        children = b",".join(
            rng.sample(some, rng.randrange(len(some) + 1)) * rng.choice((1, 1, 50))
        )
    else:
        length = rng.choice((b"-1", b"9" * 30, b"", b"x", b"0"))
    return b" ".join((kind, children, length)), body


def read_objects(raw: bytes) -> tuple[dict[str, bytes], ObjectTree]:
    """The objects by their ids, and the tree that announces them."""
    parts = unpacked(raw)
    found = {hashlib.sha256(part).hexdigest(): part for part in parts}
    *rest, last = found
    return found, ObjectTree(object_id=last, children=[ObjectTree(object_id=one) for one in rest])
