"""Progress as a document and arrays, in which a checkpoint and the journal store it."""

from __future__ import annotations

import json
from dataclasses import asdict, fields, replace
from typing import Any

import numpy as np
import pytest

from fedcore.updates.frozen import FrozenState
from server.records import VirtualRecord
from server.rounds.checkpointing.progress import Progress
from server.rounds.checkpointing.progress_codec import (
    decode_progress,
    decode_record,
    encode_progress,
)
from server.rounds.client_privacy.protection import ClientPlan, Protection, noise_of
from tests.unit.server.live.journal.journals import progress, record

PROTECTION = Protection(
    ClientPlan(9, 3, 1.1, 3), 0.25, ((4, 5), (6,)), (np.array([1 / 3, -0.0, 1e300]), np.ones(3))
)


def same(one: Progress, other: Progress) -> bool:
    plain = [each.name for each in fields(Progress) if each.name not in ("weights", "best")]
    noise = [[array.tobytes() for array in noise_of(each.protection)] for each in (one, other)]
    arrays = [[array.tobytes() for array in each.strategy.arrays] for each in (one, other)]
    return (
        one.weights.tobytes() == other.weights.tobytes()
        and one.best.tobytes() == other.best.tobytes()
        and noise[0] == noise[1]
        and arrays[0] == arrays[1]
        and one.strategy.tree == other.strategy.tree
        and all(
            getattr(one, name) == getattr(other, name)
            for name in plain
            if name not in ("strategy", "spent")
        )
    )


@pytest.mark.parametrize("protection", [None, PROTECTION, replace(PROTECTION, noise=())])
def test_what_was_encoded_is_decoded(protection: Protection | None) -> None:
    before = progress(3, over=True, best_round=2, protection=protection)
    before = replace(before, frozen=FrozenState(b"frozen"))
    encoded = encode_progress(before)
    found = decode_progress(json.loads(json.dumps(encoded.doc)), encoded.arrays)
    assert same(found, before)
    assert not same(found, replace(before, weights=before.weights + 1))


def test_every_field_but_one_of_a_process_is_encoded() -> None:
    """A field that is new must be stored, or a resumed run has other bits."""
    encoded = encode_progress(replace(progress(1), frozen=FrozenState(b"frozen")))
    stored = {*encoded.doc, *(name.partition("/")[0] for name in encoded.arrays)}
    assert {each.name for each in fields(Progress)} - {"spent"} <= stored


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"round": "3"}, TypeError),
        ({"best_round": True}, TypeError),
        ({"strategy": ...}, KeyError),
        ({"weights": np.zeros(3, np.float64)}, ValueError),
        ({"best": np.zeros(3, np.float32)}, ValueError),
        ({"weights": ...}, KeyError),
        ({"protection": {}}, KeyError),
    ],
)
def test_what_no_run_has_is_refused(changes: dict[str, Any], error: type[Exception]) -> None:
    encoded = encode_progress(progress(3))
    doc: dict[str, Any] = dict(encoded.doc)
    arrays: dict[str, Any] = dict(encoded.arrays)
    for name, value in changes.items():
        values = arrays if name in arrays else doc
        values[name] = value
        if value is ...:
            del values[name]
    with pytest.raises(error):
        decode_progress(doc, arrays)


def test_a_record_comes_back_from_an_event_of_its_round() -> None:
    before = replace(record(4), virtual=VirtualRecord(2.5, 1, 2, 3, 4, 5, 6), median_norm=1 / 3)
    assert decode_record(json.loads(json.dumps(asdict(before) | {"memory_bytes": 5}))) == before
    values = asdict(before)
    del values["updates"]
    with pytest.raises(KeyError):
        decode_record(values)
    with pytest.raises(TypeError):
        decode_record(asdict(before) | {"round": "4"})
