from __future__ import annotations

import io
import tempfile
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

from fedcore.errors import InvalidUpdate
from fedcore.flower.identity import assume_identity
from fedcore.updates.messages import (
    ARRAYS,
    CONFIG,
    METRICS,
    MODEL,
    NUM_EXAMPLES,
    Instruction,
    Update,
    array_of,
    arrived_update,
    check_weights,
    instruction_config,
    read_instruction,
    read_metrics,
    read_update,
    sendable,
    update_content,
    weights_record,
)
from fedcore.updates.pack import Layout, Vector
from fedcore.updates.pieces import PIECE_BYTES, FileArray

LAYOUT = Layout(("weight",), ((3,),))
WEIGHTS = np.array([1.0, -2.0, 3.0], np.float32)


@pytest.fixture(autouse=True)
def _identity() -> None:
    assume_identity(1)


def message(content: RecordDict) -> Message:
    return Message(content, 2, "train")


def reply(content: RecordDict) -> Message:
    return Message(content, reply_to=message(RecordDict()))


def records(**changed: Any) -> RecordDict:
    arrays = changed.get("arrays", WEIGHTS)
    metrics = {NUM_EXAMPLES: 7, "train_loss": 0.5} | changed.get("metrics", {})
    return RecordDict({ARRAYS: ArrayRecord({MODEL: Array(arrays)}), METRICS: MetricRecord(metrics)})


def test_an_update_comes_back_as_it_was() -> None:
    sent = Update(WEIGHTS, 7, {"train_loss": 0.5, "epsilon": 1.0})
    got = read_update(reply(update_content(sent)), LAYOUT)
    assert got.weights.tobytes() == WEIGHTS.tobytes()
    assert (got.num_examples, got.metrics) == (7, {"train_loss": 0.5, "epsilon": 1.0})


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
    with pytest.raises(InvalidUpdate, match="lacks what a fedcore server sends"):
        read_instruction(content)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"arrays": np.array([1, np.nan, 3], np.float32)}, "values that are not finite"),
        ({"arrays": np.array([1, np.inf, 3], np.float32)}, "values that are not finite"),
        ({"arrays": np.zeros(4, np.float32)}, r"got float32 \(4,\), expected float32 \(3,\)"),
        ({"arrays": np.zeros((1, 3), np.float32)}, r"got float32 \(1, 3\)"),
        ({"arrays": np.zeros(3)}, "got float64"),
        ({"arrays": np.zeros(3, np.int64)}, "got int64"),
        ({"metrics": {NUM_EXAMPLES: 0}}, "num-examples = 0, expected a whole number from 1"),
        ({"metrics": {NUM_EXAMPLES: -9}}, "num-examples = -9"),
        ({"metrics": {NUM_EXAMPLES: 2**31}}, "num-examples = 2147483648"),
        ({"metrics": {NUM_EXAMPLES: 1e12}}, "num-examples = 1000000000000.0"),
        ({"metrics": {NUM_EXAMPLES: [1, 2]}}, r"num-examples = \[1, 2\]"),
        ({"metrics": {"train_loss": float("nan")}}, "a metric is not finite"),
        ({"metrics": {"epsilon": float("inf")}}, "a metric is not finite"),
    ],
)
def test_a_bad_update_is_refused_with_its_reason(changed: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidUpdate, match=f"update from node 2: .*{said}"):
        read_update(reply(records(**changed)), LAYOUT)


@pytest.mark.parametrize("missing", [ARRAYS, METRICS])
def test_an_update_without_a_record_is_refused(missing: str) -> None:
    content = records()
    del content[missing]
    with pytest.raises(InvalidUpdate, match=f"no record '{missing}'"):
        read_update(reply(content), LAYOUT)


def test_an_update_without_a_count_is_refused() -> None:
    content = records()
    del content.metric_records[METRICS][NUM_EXAMPLES]
    with pytest.raises(InvalidUpdate, match="with 'num-examples' in it"):
        read_update(reply(content), LAYOUT)


def test_an_array_that_claims_more_than_it_holds_is_refused() -> None:
    array = Array(WEIGHTS)
    lying = Array("float32", (3,), array.stype, Array(np.zeros(9, np.float32)).data)
    content = RecordDict(
        {ARRAYS: ArrayRecord({MODEL: lying}), METRICS: MetricRecord({NUM_EXAMPLES: 1})}
    )
    with pytest.raises(InvalidUpdate, match=r"got float32 \(9,\)"):
        read_update(reply(content), LAYOUT)


def archive() -> bytes:
    stream = io.BytesIO()
    np.savez(stream, WEIGHTS)
    return stream.getvalue()


def objects() -> bytes:
    stream = io.BytesIO()
    np.save(stream, np.array([print, 1, 2], dtype=object), allow_pickle=True)
    return stream.getvalue()


def header(text: str) -> bytes:
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()


HUGE = "{'descr': '<f4', 'fortran_order': False, 'shape': (999999999999999,)}\n"


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(b"not an array at all", id="text"),
        pytest.param(b"\x93NUMPY", id="a beginning"),
        pytest.param(Array(WEIGHTS).data[:-1], id="cut short"),
        pytest.param(archive(), id="an archive"),
        pytest.param(objects(), id="pickled objects"),
        pytest.param(header("{'descr': ("), id="a header that does not end"),
        pytest.param(header(HUGE), id="a header that claims petabytes"),
    ],
)
def test_an_array_of_other_bytes_is_refused(data: bytes) -> None:
    lying = Array("float32", (3,), Array(WEIGHTS).stype, data)
    content = RecordDict(
        {ARRAYS: ArrayRecord({MODEL: lying}), METRICS: MetricRecord({NUM_EXAMPLES: 1})}
    )
    with pytest.raises(InvalidUpdate, match="cannot be read"):
        read_update(reply(content), LAYOUT)


def test_metrics_that_are_lists_are_left_out() -> None:
    told = {"accuracy": 0.5, "by_class": [0.1, 0.9]}
    assert read_metrics(reply(records(metrics=told)), where="here") == (
        7,
        {"train_loss": 0.5, "accuracy": 0.5},
    )


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
        with pytest.raises(InvalidUpdate, match="cannot be read"):
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


def in_file(array: Array) -> Array:
    file = tempfile.TemporaryFile()  # noqa: SIM115 - the array closes it
    file.write(array.data)
    file.flush()
    return FileArray(array.dtype, array.shape, array.stype, file)


LONG = Layout(("weight",), ((PIECE_BYTES // 4 + 3,),))


def long_reply(values: Vector, *, version: tuple[int, int] = (1, 0)) -> Message:
    stream = io.BytesIO()
    np.lib.format.write_array(stream, values, version=version)
    content = records()
    content[ARRAYS][MODEL] = in_file(  # type: ignore[index]
        Array("float32", values.shape, "numpy.ndarray", stream.getvalue())
    )
    return reply(content)


@pytest.mark.parametrize("version", [(1, 0), (2, 0)], ids=["usual", "another header"])
def test_an_update_in_a_file_is_read_by_parts(version: tuple[int, int]) -> None:
    values = np.arange(LONG.size, dtype=np.float32)
    found = arrived_update(long_reply(values, version=version), LONG)
    for _ in range(2):  # as often as it is asked for
        parts = list(found.parts())
        assert [len(part) for part in parts] == [PIECE_BYTES // 4, 3]
        assert np.concatenate(parts).tobytes() == values.tobytes()
    assert found.whole().weights.tobytes() == values.tobytes()
    assert found.whole().num_examples == found.num_examples == 7


@pytest.mark.parametrize("version", [(1, 0), (2, 0)], ids=["usual", "another header"])
@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_a_value_in_the_last_part_that_is_not_finite_is_found(
    wrong: float, version: tuple[int, int]
) -> None:
    values = np.zeros(LONG.size, np.float32)
    values[-1] = wrong
    with pytest.raises(InvalidUpdate, match="not finite"):
        arrived_update(long_reply(values, version=version), LONG)


def test_an_update_in_a_file_has_the_layouts_length_and_type() -> None:
    with pytest.raises(InvalidUpdate, match=r"got float32 \(65538,\), expected .* \(65539,\)"):
        arrived_update(long_reply(np.zeros(LONG.size - 1, np.float32)), LONG)
    with pytest.raises(InvalidUpdate, match="got float64"):
        arrived_update(long_reply(np.zeros(LONG.size, np.float64)), LONG)  # type: ignore[arg-type]
