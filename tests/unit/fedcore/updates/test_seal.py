"""A reply's signature covers everything in it, and nothing else fits it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from fedcore.crypto.keys import fingerprint, new_key, public_bytes
from fedcore.errors import DigestMismatch, SignatureInvalid, UpdateForeign, UpdateStale
from fedcore.flower.records import read_record, record_bytes
from fedcore.updates.messages import weights_record
from fedcore.updates.pieces import FileArray
from fedcore.updates.seal import (
    ENVELOPE,
    ReplySignature,
    base_digest,
    content_digest,
    round_of,
    run_digest,
    sign_reply,
    signature_of,
    verify_reply,
)

KEY = new_key()
ASKED = RecordDict(
    {
        "arrays": weights_record(np.arange(5, dtype=np.float32)),
        "config": ConfigRecord({"server-round": 4}),
    }
)


def reply(**metrics: int | float) -> RecordDict:
    return RecordDict(
        {
            "arrays": weights_record(np.ones(5, np.float32)),
            "metrics": MetricRecord({"num-examples": 3, "loss": 0.1, **metrics}),
        }
    )


def sealed(content: RecordDict) -> RecordDict:
    sign_reply(content, ASKED, purpose="train", run_id="run", node_id=7, key=KEY, now_s=1e9)
    return content


def opened(content: RecordDict, **changed: object) -> None:
    expected: dict[str, object] = {
        "purpose": "train",
        "run_id": "run",
        "round": 4,
        "node_id": 7,
        "base_sha256": base_digest(ASKED),
        "public_key": public_bytes(KEY),
        "now_s": 1e9,
    }
    verify_reply(content, **(expected | changed))  # type: ignore[arg-type]


def test_a_true_one_opens_and_tells_who_signed() -> None:
    content = sealed(reply())
    content[ENVELOPE]["signer"] = bytes(32)  # type: ignore[index]
    content[ENVELOPE]["more"] = "of the sender"  # type: ignore[index]
    raw = content[ENVELOPE][ENVELOPE]  # type: ignore[index]
    opened(content)
    assert set(content[ENVELOPE]) == {ENVELOPE, "signer", "verified-at-s"}
    signature = signature_of(content, where="here")
    assert signature == ReplySignature(raw, fingerprint(public_bytes(KEY)), 1e9)  # type: ignore[arg-type]


def test_a_signature_that_was_not_verified_is_none() -> None:
    for content in (reply(), sealed(reply())):
        with pytest.raises(SignatureInvalid, match="round 4: node 7: it has no verified signature"):
            signature_of(content, where="round 4: node 7")


def test_it_opens_after_it_has_travelled() -> None:
    content = read_record(record_bytes(sealed(reply(accuracy=1 / 3, tiny=1e-300))), where="here")
    opened(content)
    assert content_digest(content) == content_digest(reply(accuracy=1 / 3, tiny=1e-300))


@pytest.mark.parametrize(
    "change",
    [
        {"arrays": weights_record(np.full(5, 2, np.float32))},
        {"arrays": ArrayRecord({"model": Array(np.ones((5, 1), np.float32))})},
        {"arrays": ArrayRecord({"other": Array(np.ones(5, np.float32))})},
        {"metrics": MetricRecord({"num-examples": 4, "loss": 0.1})},
        {"metrics": MetricRecord({"num-examples": 3.0, "loss": 0.1})},
        {"metrics": MetricRecord({"num-examples": 3, "loss": [0.1]})},
        {"metrics": MetricRecord({"num-examples": 3})},
        {"more": MetricRecord({})},
    ],
)
def test_every_record_is_covered(change: dict[str, ArrayRecord | MetricRecord]) -> None:
    content = sealed(reply())
    content.update(change)
    with pytest.raises(DigestMismatch):
        opened(content)


def test_names_and_values_do_not_run_into_each_other() -> None:
    one = RecordDict({"m": MetricRecord({"a": 1, "b": 2})})
    other = RecordDict({"m": MetricRecord({"a": 1}), "mb": MetricRecord({"b": 2})})
    assert content_digest(one) != content_digest(other)


def test_what_it_was_not_made_for_it_does_not_open() -> None:
    for changed, kind in (
        ({"round": 5}, UpdateStale),
        ({"base_sha256": "0" * 64}, UpdateStale),
        ({"run_id": "other"}, UpdateForeign),
        ({"purpose": "evaluate"}, UpdateForeign),
        ({"node_id": 8}, UpdateForeign),
        ({"public_key": public_bytes(new_key())}, SignatureInvalid),
    ):
        with pytest.raises(kind):
            opened(sealed(reply()), **changed)  # type: ignore[arg-type]


@pytest.mark.parametrize("record", [None, ConfigRecord({}), ConfigRecord({ENVELOPE: "text"})])
def test_without_a_signature_nothing_opens(record: ConfigRecord | None) -> None:
    content = reply()
    if record is not None:
        content[ENVELOPE] = record
    with pytest.raises(SignatureInvalid, match="is not signed"):
        opened(content)


def test_a_question_outside_rounds_has_round_0() -> None:
    assert round_of(RecordDict()) == 0
    assert round_of(RecordDict({"config": ConfigRecord({"server-round": "x"})})) == 0
    assert round_of(ASKED) == 4


def test_another_beginning_is_another_run() -> None:
    assert run_digest({"run": "a", "instance": "1"}) != run_digest({"run": "a", "instance": "2"})


def test_an_array_in_a_file_is_signed_as_one_in_memory(tmp_path: Path) -> None:
    content = sealed(reply())
    array = content["arrays"]["model"]  # type: ignore[index]
    path = tmp_path / "array"
    path.write_bytes(array.data)
    content["arrays"]["model"] = FileArray(  # type: ignore[index]
        array.dtype, array.shape, array.stype, path.open("rb")
    )
    assert content_digest(content) == content_digest(reply())
    path.write_bytes(array.data[:-1] + bytes([array.data[-1] ^ 1]))
    with pytest.raises(DigestMismatch):
        opened(content)
