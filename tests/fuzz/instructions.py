"""Whole instructions, from the objects that a server announces to a model that could be trained.

Beside them what a server tells of its run before the first.
"""

from __future__ import annotations

from functools import cache
from random import Random
from typing import Any

from flwr.app import Array, Message, RecordDict
from safetensors.torch import save

from edge_client.agent.run import read_settings
from fedcore.config.client_settings import SETTABLE, key_of
from fedcore.config.owner import OPEN_POLICY
from fedcore.flower.fleet_pull import AnnouncedMessage, read_content
from fedcore.flower.identity import assume_identity
from fedcore.seeds import Simulated
from fedcore.training.client import Client, model_of, settings_of
from fedcore.training.server_numbers import check_instruction
from fedcore.updates.messages import read_instruction, weights_record
from fedcore.updates.pack import pack
from tests.fuzz.mutate import damaged, damaged_json, packed, unpacked
from tests.fuzz.wire import array, objects, odd_content, read_objects
from tests.unit.fedcore.clients import make_run, make_task

LIMIT_BYTES = 1 << 20
_ROUNDS = (0, 1, 3, "3", "\x1b", 10**7, 10**7 + 1, 2**63 - 1, 2.5, -1, "9" * 5000, b"3")
_NUMBERS = (0.1, "0.1", "nan", "inf", 1e300, -1.0, "\x1b[2J", "9" * 5000, 2**63 - 1, [0.1, 0.2])

_HEADS = (
    *(b"{}", b"[" * 3000, b'{"a":{"dtype":"F32","shape":[1e9],"data_offsets":[0,4]}}'),
    *(b'{"a":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,0]}}', b"\xff" * 90),
)


@cache
def _client() -> Client:

    run = make_run(federation={"rounds": 3, "normalisation": "federated"})
    task = make_task()
    return Client(task, run, OPEN_POLICY, Simulated(1))


@cache
def _settings() -> bytes:
    run = make_run(privacy={"unit": "example", "target_delta": 1e-3, "max_epsilon": 8.0})
    return run.model_dump_json().encode()


def make(rng: Random) -> bytes:
    """An instruction, an honest one nearly; now and then the settings of a run."""
    assume_identity(1)
    if rng.randrange(8) == 0:
        raw = _settings()
        return packed([b"s", damaged_json(rng, raw) if rng.randrange(6) else damaged(rng, raw)])
    resident = _client().resident
    weights = pack(resident.model.model)
    config: dict[str, Any] = {
        "server-round": rng.choice(_ROUNDS[:4] if rng.randrange(4) else _ROUNDS),
        "layout": resident.layout.digest,
        "preprocess": _preprocess(rng),
    }
    for name in ("proximal-mu", "clip-norm"):
        if rng.randrange(4) == 0:
            config[name] = rng.choice(_NUMBERS)
    for name in SETTABLE:
        if rng.randrange(16) == 0:
            config[key_of(name)] = rng.choice((*_NUMBERS, 0.5, 1, 2, True))
    model = array(rng, len(weights)) if rng.randrange(3) == 0 else weights_record(weights)["model"]
    assert isinstance(model, Array)
    content = odd_content(rng, {"arrays": {"model": model}, "config": config}, len(weights))
    return packed([b"m", objects(rng, content)])


@cache
def _honest() -> bytes:
    return bytes(save(_client().resident.model.preprocess.state_dict()))


def _preprocess(rng: Random) -> bytes:
    kind = rng.randrange(24)
    if kind > 4:
        return _honest()
    state = _client().resident.model.preprocess.state_dict()
    if kind == 0:
        state = {name: value * float("nan") for name, value in state.items()}
    elif kind == 1:
        state = {name: value.double()[:1] for name, value in state.items()}
    elif kind == 2:
        state = {f"\x1b{name}": value for name, value in state.items()}
    raw = bytes(save({name: value.contiguous() for name, value in state.items()}))
    if kind == 3:
        return damaged(rng, raw)
    if kind == 4:
        head = rng.choice(_HEADS)
        return len(head).to_bytes(8, "little") + head
    return raw


def read(raw: bytes) -> None:
    """As a device reads what a server sends."""
    assume_identity(1)
    kind, rest = unpacked(raw)
    if kind == b"s":
        read_settings(rest.decode(errors="replace"))
        return
    held, tree = read_objects(rest)
    announced = AnnouncedMessage(Message(RecordDict(), 7, "train"), tree)

    def pull(object_id: str, max_bytes: int) -> bytes:
        return held[object_id][:max_bytes]

    content = read_content(announced, pull, limit_bytes=LIMIT_BYTES)
    instruction = read_instruction(content)
    model = model_of(_client(), instruction)
    check_instruction(instruction, model, initial=True)
    settings_of(_client(), instruction)
