from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from fedcore.errors import InvalidUpdate
from fedcore.flower.identity import assume_identity
from fedcore.updates.messages import (
    ARRAYS,
    CONFIG,
    MODEL,
    Instruction,
    array_of,
    check_weights,
    instruction_config,
    joined,
    read_instruction,
    sendable,
    weights_record,
)
from fedcore.updates.pack import Layout

LAYOUT = Layout(("weight",), ((3,),))
WEIGHTS = np.array([1.0, -2.0, 3.0], np.float32)


@pytest.fixture(autouse=True)
def _identity() -> None:
    assume_identity(1)


def test_an_instruction_comes_back_as_it_was() -> None:
    config = instruction_config(LAYOUT, b"state")
    config["server-round"] = 3
    config["proximal-mu"] = 0.25
    got = read_instruction(RecordDict({ARRAYS: weights_record(WEIGHTS), CONFIG: config}))
    assert got.weights.tobytes() == WEIGHTS.tobytes()
    assert got == Instruction(3, got.weights, LAYOUT.digest, b"state", 0.25)


def instructions() -> Iterator[tuple[str, RecordDict]]:
    config = {"server-round": 1, "layout": "x", "preprocess": b""}
    arrays = weights_record(WEIGHTS)
    yield "nothing at all", RecordDict()
    yield "no weights", RecordDict({CONFIG: ConfigRecord(dict(config))})
    yield "no configuration", RecordDict({ARRAYS: arrays})
    for key in config:
        left = {name: value for name, value in config.items() if name != key}
        yield f"no {key}", RecordDict({ARRAYS: arrays, CONFIG: ConfigRecord(left)})
    odd = ConfigRecord({**config, "server-round": "soon"})
    yield "a round that is no number", RecordDict({ARRAYS: arrays, CONFIG: odd})
    odd = ConfigRecord({**config, "preprocess": "text"})
    yield "a state that is text", RecordDict({ARRAYS: arrays, CONFIG: odd})


@pytest.mark.parametrize(
    "content", [pytest.param(content, id=name) for name, content in instructions()]
)
def test_what_is_no_instruction_is_refused(content: RecordDict) -> None:
    with pytest.raises(InvalidUpdate, match="not a valid message of a fedcore server"):
        read_instruction(content)


def test_weights_that_fit_are_handed_on() -> None:
    assert check_weights(WEIGHTS, LAYOUT, where="here") is WEIGHTS
    with pytest.raises(InvalidUpdate, match=r"here: got float64 \(3,\)"):
        check_weights(WEIGHTS.astype(np.float64), LAYOUT, where="here")  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [1, 2, 7850, 10_000_000])
def test_a_vector_is_read_as_numpy_reads_it(size: int) -> None:
    values = np.arange(size, dtype=np.float32)
    read = array_of(Array(values), where="here")
    assert read.dtype == np.float32
    assert np.array_equal(read, values)


def test_a_vector_with_a_byte_too_few_or_too_many_is_refused() -> None:
    whole = Array(np.arange(5, dtype=np.float32))
    for data in (whole.data[:-1], whole.data[:-4]):
        with pytest.raises(InvalidUpdate, match="cannot read"):
            array_of(Array(dtype="float32", shape=(5,), stype="numpy.ndarray", data=data), where="")


def test_weights_that_are_sendable_are_held_once() -> None:
    weights = sendable(WEIGHTS)
    assert weights.tobytes() == WEIGHTS.tobytes()
    sent = weights_record(weights)[MODEL]
    assert sent.data is weights_record(weights)[MODEL].data
    assert sent.data == weights_record(WEIGHTS)[MODEL].data
    assert np.shares_memory(sendable(weights), weights)
    with pytest.raises(ValueError, match="read-only"):
        weights[0] = 1.0  # it would change what is on its way


@pytest.mark.parametrize("part", [slice(1, None), slice(None, None, -1), slice(0, 2)])
def test_a_part_of_sendable_weights_is_sent_as_what_it_is(part: slice) -> None:
    weights = sendable(WEIGHTS)[part]
    assert weights_record(weights)[MODEL].numpy().tolist() == WEIGHTS[part].tolist()


@pytest.mark.parametrize(
    ("name", "value"),
    [("preprocess", 10**12), ("preprocess", "text"), ("layout", b"bytes"), ("layout", [1.0])],
)
def test_a_setting_of_another_type_is_refused_before_anything_is_allocated(
    name: str, value: Any
) -> None:
    config = ConfigRecord({"server-round": 1, "layout": "a", "preprocess": b""} | {name: value})
    content = RecordDict({ARRAYS: weights_record(np.zeros(3, np.float32)), CONFIG: config})
    with pytest.raises(InvalidUpdate, match=f"'{name}' is a"):
        read_instruction(content)


@pytest.mark.parametrize("weights", [np.zeros(3), np.zeros(3, np.complex64), np.zeros((3, 1))])
def test_weights_that_are_no_float32_vector_are_not_cast(weights: Any) -> None:
    config = ConfigRecord({"server-round": 1, "layout": "a", "preprocess": b""})
    content = RecordDict({ARRAYS: ArrayRecord({MODEL: Array(weights)}), CONFIG: config})
    with pytest.raises(InvalidUpdate, match="not float32"):
        read_instruction(content)


@pytest.mark.parametrize("size", [0, 3, 2**21 + 1], ids=["none", "few", "in huge pages"])
def test_parts_are_joined_to_a_vector_that_is_sent_without_a_copy(size: int) -> None:
    values = np.arange(size, dtype=np.float32)
    found = joined(np.split(values, [size // 3, size // 2]), size)
    assert found.tobytes() == values.tobytes()
    assert not found.flags.writeable
    if size:
        assert weights_record(found)[MODEL].data is found.base


@pytest.mark.parametrize("size", [2, 4])
def test_parts_of_another_length_are_not_joined(size: int) -> None:
    with pytest.raises((AssertionError, ValueError)):
        joined([WEIGHTS], size)
