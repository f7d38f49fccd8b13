"""Our reader and writer of the protocol's messages against protobuf's own, and hostile bytes."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tritonclient.grpc import service_pb2 as pb

from edge_client.serving import messages, rest, wire
from edge_client.serving.protocol import (
    DATATYPES,
    InferAnswer,
    TensorSpec,
    checked_inputs,
    datatype_of,
)
from fedcore.errors import RequestRefused

SPECS = (TensorSpec("input", "FP32", (-1, 4)),)
names = st.text(min_size=1, max_size=12)
sizes = st.integers(-3, 2**40)
_FIELDS = {
    "INT32": ("int_contents", st.integers(-(2**31), 2**31 - 1)),
    "INT64": ("int64_contents", st.integers(-(2**63), 2**63 - 1)),
    "UINT32": ("uint_contents", st.integers(0, 2**32 - 1)),
    "UINT64": ("uint64_contents", st.integers(0, 2**64 - 1)),
    "BOOL": ("bool_contents", st.booleans()),
    "FP32": ("fp32_contents", st.floats(width=32, allow_nan=False)),
    "FP64": ("fp64_contents", st.floats(allow_nan=False)),
}


@given(
    names, names, st.lists(st.tuples(names, st.lists(sizes, max_size=5), st.binary()), max_size=4)
)
def test_requests_with_raw_contents_are_read_as_protobuf_reads_them(
    model: str, number: str, tensors: list[Any]
) -> None:
    request = pb.ModelInferRequest(model_name=model, id=number)
    request.parameters["timeout"].int64_param = 250
    for name, shape, raw in tensors:
        request.inputs.add(name=name, datatype="FP32", shape=shape)
        request.raw_input_contents.append(raw)
        request.outputs.add(name=name)
    found = messages.read_infer_request(request.SerializeToString())
    assert (found.model, found.id, found.timeout_us) == (model, number, 250)
    assert list(found.outputs) == [name for name, _, _ in tensors]
    assert [(one.name, list(one.shape), bytes(one.raw or b"")) for one in found.tensors] == [
        (name, shape, raw) for name, shape, raw in tensors
    ]


@given(st.data(), st.sampled_from(sorted(_FIELDS)))
def test_typed_contents_are_read_as_protobuf_reads_them(data: Any, datatype: str) -> None:
    field, element = _FIELDS[datatype]
    values = data.draw(st.lists(element, max_size=40))
    request = pb.ModelInferRequest()
    tensor = request.inputs.add(name="x", datatype=datatype, shape=[len(values)])
    getattr(tensor.contents, field).extend(values)
    (found,) = messages.read_infer_request(request.SerializeToString()).tensors
    assert found.elements is not None
    assert found.elements.tolist() == list(getattr(tensor.contents, field))


@given(names, st.sampled_from(sorted(DATATYPES)), st.integers(0, 3), st.integers(1, 5))
def test_answers_are_what_protobuf_writes(
    name: str, datatype: str, rows: int, columns: int
) -> None:
    array = np.arange(rows * columns).reshape(rows, columns).astype(DATATYPES[datatype])
    assert datatype_of(array.dtype) == datatype
    raw = messages.write_infer_answer(InferAnswer("m", "7", "id", {name: array}))
    expected = pb.ModelInferResponse(model_name="m", model_version="7", id="id")
    expected.outputs.add(name=name, datatype=datatype, shape=array.shape)
    expected.raw_output_contents.append(array.tobytes())
    assert pb.ModelInferResponse.FromString(raw) == expected


@given(st.binary(max_size=200))
def test_no_bytes_are_worse_than_refused(raw: bytes) -> None:
    assert fits(lambda: messages.read_infer_request(raw))
    with suppress(RequestRefused):
        texts = messages.read_texts(raw, {1: "name", 2: "version"})
        assert set(texts) <= {"name", "version"}
        assert all(isinstance(text, str) for text in texts.values())
    for read in (messages.read_index_request, messages.read_load_request):
        with suppress(RequestRefused):
            assert len(str(read(raw))) <= 8 * len(raw) + 100, "no more than was sent"


def fits(read: Callable[[], Any]) -> bool:
    """Whether a request is refused, or its inputs are arrays that the model takes."""
    try:
        inputs = checked_inputs(read(), SPECS, max_rows=64)
    except RequestRefused:
        return True
    (array,) = inputs.values()
    rows = len(array)
    return (
        list(inputs) == ["input"]
        and array.dtype == np.float32
        and array.shape == (rows, 4)
        and rows <= 64
    )


@settings(max_examples=200)
@given(st.data())
def test_changed_requests_are_no_worse_than_refused(data: Any) -> None:
    request = pb.ModelInferRequest(model_name="m")
    request.inputs.add(name="input", datatype="FP32", shape=[2, 4])
    request.raw_input_contents.append(bytes(32))
    raw = bytearray(request.SerializeToString())
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(raw) - 1))
        raw[place : place + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=3))
        if not raw:
            break
    assert fits(lambda: messages.read_infer_request(bytes(raw)))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=12,
)
tensor_fields = st.fixed_dictionaries(
    {},
    optional={
        "name": st.just("input") | json_values,
        "datatype": st.sampled_from(["FP32", "INT64", "BYTES"]) | json_values,
        "shape": st.lists(sizes, max_size=3) | st.just([1, 4]) | json_values,
        "data": st.lists(st.floats(), max_size=6) | json_values,
        "parameters": st.dictionaries(st.sampled_from(["binary_data_size", "x"]), json_values),
    },
)


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "id": json_values,
            "inputs": st.lists(tensor_fields, max_size=3) | json_values,
            "outputs": st.lists(st.dictionaries(st.just("name"), json_values)) | json_values,
            "parameters": json_values,
        },
    ),
    st.binary(max_size=40),
    st.integers(-2, 60) | st.none(),
)
def test_no_json_is_worse_than_refused(body: Any, tail: bytes, length: int | None) -> None:
    raw = json.dumps(body).encode()
    assert fits(lambda: rest.read_infer_request("m", "", raw + tail, length)[0])


@pytest.mark.parametrize("shape", [[2**36], [2**18, 2**18], [1, 2**36], [2**62, 2**62]])
def test_a_size_that_is_only_declared_allocates_nothing(shape: list[int]) -> None:
    request = pb.ModelInferRequest(model_name="m")
    request.inputs.add(name="input", datatype="FP32", shape=shape)
    raw = request.SerializeToString()
    assert len(raw) < 128
    tensor = {"name": "input", "datatype": "FP32", "shape": shape, "data": []}
    body = json.dumps({"inputs": [tensor]}).encode()
    specs = (TensorSpec("input", "FP32", (-1,) * len(shape)),)
    tracemalloc.start()
    for read in (
        lambda: messages.read_infer_request(raw),
        lambda: rest.read_infer_request("m", "", body, None)[0],
    ):
        with pytest.raises(RequestRefused):
            checked_inputs(read(), specs, max_rows=2**63)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 1 << 20


@pytest.mark.parametrize(
    "piece",
    [b"\x2a\x00", b"\x22\x00", b"\x32\x00", b"\x3a\x00", b"\x2a\x04\x22\x02\x0a\x00", b"\x78\x00"],
)
def test_a_message_of_many_small_parts_stays_small(piece: bytes) -> None:
    raw = piece * (1 << 20)
    tracemalloc.start()
    with pytest.raises(RequestRefused):
        messages.read_infer_request(raw)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 16 << 20


def test_packed_numbers_are_bounded() -> None:
    with pytest.raises(RequestRefused, match="more than the 1048576 allowed") as caught:
        wire.packed([b"\x01" * ((1 << 20) + 1)], "i8")
    assert caught.value.reason == "too_large"
    assert len(wire.packed([b"\x01" * (1 << 20)], "i8")) == 1 << 20
