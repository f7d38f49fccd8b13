"""What a reply may hold: the right one comes back, and whatever else is refused by its reason."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

from fedcore.errors import InvalidUpdate, ResourceError
from fedcore.flower.identity import assume_identity
from fedcore.updates.messages import ARRAYS, METRICS, MODEL, NUM_EXAMPLES, Update, update_content
from fedcore.updates.pack import Vector
from fedcore.updates.pieces import PIECE_BYTES, FileArray, PathArray
from fedcore.updates.replies import (
    LARGEST,
    MAX_ENTRIES,
    ArraySpec,
    Range,
    Reply,
    ReplySpec,
    check_structure,
    read_reply,
)

WEIGHTS = np.array([1.0, -2.0, 3.0], np.float32)
RANGES = {"train_loss": Range(), "epsilon": Range(0.0, 8.0)}
ASKED = ReplySpec("train", RANGES, {MODEL: ArraySpec("float32", (3,))})
SURROGATE = "a\ud800"


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


def read(message: Message, asked: ReplySpec = ASKED, **more: Any) -> Reply:
    return read_reply(message, asked, where="update from node 2", **more)


def test_an_update_comes_back_as_it_was() -> None:
    sent = Update(WEIGHTS, 7, {"train_loss": 0.5, "epsilon": 1.0})
    got = read(reply(update_content(sent))).update()
    assert got.weights.tobytes() == WEIGHTS.tobytes()
    assert (got.num_examples, got.metrics) == (7, {"train_loss": 0.5, "epsilon": 1.0})


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
        ({"metrics": {NUM_EXAMPLES: [1, 2]}}, "'metrics.num-examples' is a list"),
        ({"metrics": {"train_loss": [0.5]}}, "'metrics.train_loss' is a list"),
        ({"metrics": {"train_loss": 1e300}}, r"train_loss = 1e\+300, expected -1e\+18 to 1e\+18"),
        ({"metrics": {"epsilon": 8.5}}, "epsilon = 8.5, expected 0 to 8"),
        ({"metrics": {"epsilon": -1.0}}, "epsilon = -1, expected 0 to 8"),
        ({"metrics": {"accuracy": 1.0}}, "it contains metric 'accuracy', which was not requested"),
        ({"metrics": {"train_loss": float("nan")}}, "a metric is not finite"),
        ({"metrics": {"epsilon": float("inf")}}, "a metric is not finite"),
    ],
)
def test_a_bad_update_is_refused_with_its_reason(changed: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidUpdate, match=f"update from node 2: .*{said}"):
        read(reply(records(**changed)))


@pytest.mark.parametrize("missing", [ARRAYS, METRICS])
def test_an_update_without_a_record_is_refused(missing: str) -> None:
    content = records()
    del content[missing]
    with pytest.raises(InvalidUpdate, match=f"no record '{missing}'"):
        read(reply(content))


def test_an_update_without_a_count_is_refused() -> None:
    content = records()
    del content.metric_records[METRICS][NUM_EXAMPLES]
    with pytest.raises(InvalidUpdate, match="with 'num-examples'"):
        read(reply(content))


def test_an_array_that_claims_more_than_it_holds_is_refused() -> None:
    array = Array(WEIGHTS)
    lying = Array("float32", (3,), array.stype, Array(np.zeros(9, np.float32)).data)
    content = RecordDict(
        {ARRAYS: ArrayRecord({MODEL: lying}), METRICS: MetricRecord({NUM_EXAMPLES: 1})}
    )
    with pytest.raises(InvalidUpdate, match=r"got float32 \(9,\)"):
        read(reply(content))


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
    with pytest.raises(InvalidUpdate, match="cannot read"):
        read(reply(content))


def in_file(array: Array) -> Array:
    file = tempfile.TemporaryFile()  # noqa: SIM115 - the array closes it
    file.write(array.data)
    file.flush()
    return FileArray(array.dtype, array.shape, array.stype, file)


LENGTH = PIECE_BYTES // 4 + 3
LONG = ReplySpec("train", RANGES, {MODEL: ArraySpec("float32", (LENGTH,))})


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
    values = np.arange(LENGTH, dtype=np.float32)
    found = read(long_reply(values, version=version), LONG)
    for _ in range(2):  # as often as it is asked for
        parts = list(found.parts())
        assert [len(part) for part in parts] == [PIECE_BYTES // 4, 3]
        assert np.concatenate(parts).tobytes() == values.tobytes()
    assert found.update().weights.tobytes() == values.tobytes()
    assert found.update().num_examples == found.num_examples == 7


@pytest.mark.parametrize("version", [(1, 0), (2, 0)], ids=["usual", "another header"])
@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_a_value_in_the_last_part_that_is_not_finite_is_found(
    wrong: float, version: tuple[int, int]
) -> None:
    values = np.zeros(LENGTH, np.float32)
    values[-1] = wrong
    with pytest.raises(InvalidUpdate, match="not finite"):
        read(long_reply(values, version=version), LONG)


def test_an_update_in_a_file_has_the_layouts_length_and_type() -> None:
    with pytest.raises(InvalidUpdate, match=r"got float32 \(65538,\), expected .* \(65539,\)"):
        read(long_reply(np.zeros(LENGTH - 1, np.float32)), LONG)
    with pytest.raises(InvalidUpdate, match="got float64"):
        read(long_reply(np.zeros(LENGTH, np.float64)), LONG)  # type: ignore[arg-type]


def test_the_distance_to_the_weights_that_were_sent_is_measured() -> None:
    base = np.array([1.0, 1.0, -1.0], np.float32)
    assert read(reply(records()), base=base).distance == 5.0
    assert read(reply(records())).distance is None


def kept(tmp_path: Path, array: Array) -> PathArray:
    path = tmp_path / "value"
    path.write_bytes(array.data)
    return PathArray(array.dtype, array.shape, array.stype, path)


def test_a_file_that_cannot_be_read_is_this_machines_fault(tmp_path: Path) -> None:
    content = records()
    content[ARRAYS][MODEL] = kept(tmp_path, Array(WEIGHTS))  # type: ignore[index]
    assert read(reply(content)).update().weights.tolist() == WEIGHTS.tolist()
    (tmp_path / "value").unlink()
    with pytest.raises(ResourceError, match="cannot read its bytes from this machine's disk"):
        read(reply(content))


def test_a_reply_of_another_type_than_asked_is_refused() -> None:
    wrong = reply(records())
    wrong.metadata.__dict__["_message_type"] = "evaluate"
    with pytest.raises(InvalidUpdate, match="replies to 'evaluate', expected one to 'train'"):
        read(wrong)


def test_where_every_metric_is_asked_for_each_must_be_there() -> None:
    asked = ReplySpec("train", {"accuracy": Range(0, 1), "f1": Range(0, 1)}, every_metric=True)
    told = {NUM_EXAMPLES: 3, "accuracy": 1, "f1": 0.5}
    found = read(reply(RecordDict({METRICS: MetricRecord(told)})), asked)
    assert found == Reply(3, {"accuracy": 1.0, "f1": 0.5})
    del told["f1"]
    with pytest.raises(InvalidUpdate, match="no metric 'f1'"):
        read(reply(RecordDict({METRICS: MetricRecord(told)})), asked)


def with_array(name: str, array: Array) -> RecordDict:
    content = records()
    content[ARRAYS][name] = array  # type: ignore[index]
    return content


def announced(dtype: Any = "float32", shape: Any = (3,), stype: str = "numpy.ndarray") -> Array:
    array = Array(WEIGHTS)
    array.dtype, array.shape, array.stype = dtype, shape, stype
    return array


def more_metrics(count: int) -> RecordDict:
    return records(metrics={f"m{place}": 1.0 for place in range(count)})


def more_records(count: int, name: str = "r{}") -> RecordDict:
    content = records()
    for place in range(count):
        content[name.format(place)] = ConfigRecord({"a": b"1"})
    return content


def setting(value: Any) -> RecordDict:
    content = records()
    content["settings"] = ConfigRecord({"a": value})
    return content


ODD: dict[str, Callable[[], RecordDict]] = {
    "an array that was not asked for": lambda: with_array("x", Array(WEIGHTS)),
    "an array by a name that no text holds": lambda: with_array(SURROGATE, Array(WEIGHTS)),
    "a type that no text holds": lambda: with_array(MODEL, announced(dtype=SURROGATE)),
    "a type that is no text": lambda: with_array(MODEL, announced(dtype=7)),
    "another storage": lambda: with_array(MODEL, announced(stype="pickle")),
    "another type than it holds": lambda: with_array(MODEL, announced(dtype="float64")),
    "another shape than it holds": lambda: with_array(MODEL, announced(shape=(1,))),
    "a shape without end": lambda: with_array(MODEL, announced(shape=(1,) * 10**6)),
    "a shape of no numbers": lambda: with_array(MODEL, announced(shape=("3",))),
    "a shape below zero": lambda: with_array(MODEL, announced(shape=(-3,))),
    "300 arrays": lambda: RecordDict(
        {
            ARRAYS: ArrayRecord({f"a{place}": Array(WEIGHTS) for place in range(300)}),
            METRICS: MetricRecord({NUM_EXAMPLES: 1}),
        }
    ),
    "90,000 metrics": lambda: more_metrics(90_000),
    "one metric too many": lambda: more_metrics(1),
    "a metric by a name that moves the cursor": lambda: records(metrics={"\x1b[2J": 1.0}),
    "a metric by a name that no text holds": lambda: records(metrics={SURROGATE: 1.0}),
    "a metric by a name of a megabyte": lambda: records(metrics={"m" * 10**6: 1.0}),
    "a metric without a name": lambda: records(metrics={"": 1.0}),
    "records without end": lambda: more_records(1000),
    "a record that was not asked for": lambda: more_records(1),
    "a record by a name that no text holds": lambda: more_records(1, SURROGATE),
    "a setting of a megabyte": lambda: setting(b"x" * 10**6),
    "a setting that is text": lambda: setting("text"),
    "settings in place of metrics": lambda: RecordDict(
        {ARRAYS: records()[ARRAYS], METRICS: ConfigRecord({NUM_EXAMPLES: 1})}
    ),
    "settings in place of arrays": lambda: RecordDict(
        {ARRAYS: ConfigRecord({MODEL: b"1"}), METRICS: records()[METRICS]}
    ),
}


@pytest.mark.parametrize("name", ODD)
def test_what_was_not_asked_for_is_refused_in_words_that_can_be_printed(name: str) -> None:
    with pytest.raises(InvalidUpdate, match="update from node 2: ") as caught:
        read(reply(ODD[name]()))
    said = str(caught.value)
    assert said.isprintable()
    assert len(said) < 600
    assert said.encode()


@pytest.mark.parametrize("count", [MAX_ENTRIES, MAX_ENTRIES + 1])
def test_a_record_has_so_many_entries_at_most(count: int) -> None:
    content = RecordDict({METRICS: MetricRecord({f"m{place}": 1 for place in range(count)})})
    if count <= MAX_ENTRIES:
        check_structure(content, where="here")
    else:
        with pytest.raises(InvalidUpdate, match="has 257 entries, expected at most 256"):
            check_structure(content, where="here")


@pytest.mark.parametrize("value", [LARGEST, -LARGEST])
def test_the_largest_numbers_that_are_taken_add_up(value: float) -> None:
    found = read(reply(records(metrics={NUM_EXAMPLES: 2**31 - 1, "train_loss": value})))
    assert np.isfinite(found.metrics["train_loss"] * found.num_examples * 1e6)
