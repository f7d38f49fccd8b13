"""The messages of the Open Inference Protocol's gRPC service, read from and written to bytes.

Source: ``open_inference_grpc.proto`` of the Open Inference Protocol, whose field numbers these are,
and Triton's ``grpc_service.proto`` for the repository extension.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from edge_client.serving import wire
from edge_client.serving.protocol import (
    MAX_DIMENSIONS,
    MAX_NAME,
    InferAnswer,
    InferRequest,
    Tensor,
    TensorSpec,
    datatype_of,
)
from fedcore.artifacts.golden import AnyArray
from fedcore.errors import RequestRefused
from fedcore.observability.foreign import foreign

MAX_TENSORS = 64
"""Most inputs, and most named outputs, of one request."""
_MAX_DESCRIPTION_BYTES = 4096
"""Most bytes of a tensor's name, type, shape and parameters."""
_CONTENTS = {1: "b", 2: "i8", 3: "i8", 4: "u8", 5: "u8", 6: "f4", 7: "f8"}
"""Kinds of numbers by field of ``InferTensorContents``."""
_OF_DATATYPE = {
    "BOOL": 1, "INT8": 2, "INT16": 2, "INT32": 2, "INT64": 3,
    "UINT8": 4, "UINT16": 4, "UINT32": 4, "UINT64": 5, "FP32": 6, "FP64": 7,
}  # fmt: skip
"""The field of ``InferTensorContents`` that holds a datatype; FP16 has none."""
_UNSUPPORTED = ("sequence_id", "sequence_start", "sequence_end", "shared_memory_region")
_UNSUPPORTED_OUTPUT = ("classification", "shared_memory_region")


@dataclass(frozen=True)
class ModelStatus:
    """A model in the repository's index."""

    name: str
    version: str
    state: str
    """``READY``, ``UNAVAILABLE`` or ``LOADING``."""
    reason: str = ""


@dataclass(frozen=True)
class ModelDescription:
    """What clients may know of a model: its version, inputs and outputs."""

    name: str
    version: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    platform: str = "onnx_onnxv1"


def read_infer_request(raw: bytes) -> InferRequest:
    """Reads ``ModelInferRequest``.

    Raises:
        RequestRefused: it is malformed, or asks for something that is not offered.
    """
    texts = ["", "", "", ""]
    tensors: list[tuple[int, int]] = []
    outputs: list[str] = []
    contents: list[memoryview] = []
    timeout_us, view = 0, memoryview(raw)
    for number, kind, start, end in wire.fields(raw, 0, len(raw)):
        if number <= 3:
            texts[number] = wire.text(raw, kind, start, end, max_bytes=MAX_NAME)
            continue
        if number <= 7:
            wire.need(kind, 2)
        if number == 4:
            timeout_us = _parameter(raw, start, end, refused=_UNSUPPORTED) or timeout_us
        elif number == 5:
            tensors.append((start, end))
        elif number == 6:
            outputs.append(_requested_output(raw[start : start + _bounded(end - start)]))
        elif number == 7:
            contents.append(view[start:end])
        if max(len(tensors), len(outputs), len(contents)) > MAX_TENSORS:
            raise wire.malformed(f"more than {MAX_TENSORS} tensors")
    if contents and len(contents) != len(tensors):
        raise RequestRefused(
            f"request: {len(contents)} raw_input_contents for {len(tensors)} inputs, expected one "
            "for each or none. Nothing was answered."
        )
    return InferRequest(
        model=texts[1],
        version=texts[2],
        id=texts[3],
        tensors=[
            _raw_input(raw[start : start + _bounded(end - start)], contents[place])
            if contents
            else _typed_input(raw, start, end)
            for place, (start, end) in enumerate(tensors)
        ],
        outputs=outputs,
        timeout_us=timeout_us,
        received_bytes=len(raw),
    )


def _bounded(size: int) -> int:
    if size > _MAX_DESCRIPTION_BYTES:
        raise wire.malformed(
            f"a tensor's description of {size} bytes, more than the {_MAX_DESCRIPTION_BYTES} "
            "allowed beside raw_input_contents"
        )
    return size


def _raw_input(described: bytes, content: memoryview) -> Tensor:
    name, datatype, shape = _described(described)
    return Tensor(name, datatype, shape, raw=content)


@lru_cache(maxsize=256)  # clients send the same description again and again
def _described(raw: bytes) -> tuple[str, str, tuple[int, ...]]:
    name, datatype, shape, typed = _input(raw, 0, len(raw))
    if typed is not None:
        raise RequestRefused(
            f"input {foreign(name, 64)!r}: it has both contents and raw_input_contents, expected "
            "one of them. Nothing was answered."
        )
    return name, datatype, shape


def _typed_input(raw: bytes, begin: int, finish: int) -> Tensor:
    name, datatype, shape, typed = _input(raw, begin, finish)
    if typed is None:
        return Tensor(name, datatype, shape, elements=np.zeros(0, bool))
    elements = _typed(raw, *typed, datatype)
    return Tensor(name, datatype, shape, elements=elements)


def _input(
    raw: bytes, begin: int, finish: int
) -> tuple[str, str, tuple[int, ...], tuple[int, int] | None]:
    """Reads ``InferInputTensor``: name, datatype, shape, and where its contents are, if any."""
    name = datatype = ""
    shape: tuple[int, ...] = ()
    typed: tuple[int, int] | None = None
    for number, kind, start, end in wire.fields(raw, begin, finish):
        if number == 1:
            name = wire.text(raw, kind, start, end, max_bytes=MAX_NAME)
        elif number == 2:
            datatype = wire.text(raw, kind, start, end, max_bytes=MAX_NAME)
        elif number == 3:
            shape += _sizes(raw, start, end)
        elif number == 4:
            wire.need(kind, 2)
            _parameter(raw, start, end, refused=_UNSUPPORTED)
        elif number == 5:
            wire.need(kind, 2)
            typed = (start, end) if start < end else typed
        if len(shape) > MAX_DIMENSIONS:
            raise wire.malformed(f"a shape of more than {MAX_DIMENSIONS} dimensions")
    return name, datatype, shape, typed


def _sizes(raw: bytes, at: int, end: int) -> tuple[int, ...]:
    if end - at > MAX_DIMENSIONS * 10:
        raise wire.malformed(f"a shape of more than {MAX_DIMENSIONS} dimensions")
    found = []
    while at < end:
        size, at = wire.varint(raw, at, end)
        found.append(size - (1 << 64) if size >= 1 << 63 else size)
    return tuple(found)


def _typed(raw: bytes, begin: int, finish: int, datatype: str) -> AnyArray:
    expected = _OF_DATATYPE.get(datatype)
    pieces: list[bytes] = []
    for number, _, start, end in wire.fields(raw, begin, finish):
        if number in _CONTENTS and number != expected and start < end:
            raise RequestRefused(
                f"input of datatype {foreign(datatype, 32)!r}: its contents are in a field of "
                "another type. Nothing was answered."
            )
        if number == 8:
            raise RequestRefused("input: datatype BYTES is not offered. Nothing was answered.")
        if number == expected:
            pieces.append(raw[start:end])
    return wire.packed(pieces, _CONTENTS[expected]) if expected else np.zeros(0, bool)


def _parameter(raw: bytes, begin: int, finish: int, *, refused: Sequence[str]) -> int:
    """Reads one entry of a map of parameters; returns the ``timeout``, 0 if it is another one."""
    name, value = "", 0
    for number, kind, start, end in wire.fields(raw, begin, finish):
        if number == 1:
            name = wire.text(raw, kind, start, end, max_bytes=MAX_NAME)
        elif number == 2:
            wire.need(kind, 2)
            for inner, wired, at, _ in wire.fields(raw, start, end):
                if inner in (2, 5) and wired == 0:
                    value, _ = wire.varint(raw, at, end)
    if name in refused:
        raise RequestRefused(
            f"request: parameter {name!r} is not offered. Nothing was answered; send the request "
            "without it.",
            "unsupported",
        )
    return value if name == "timeout" and value < 1 << 63 else 0


@lru_cache(maxsize=256)
def _requested_output(raw: bytes) -> str:
    name = ""
    for number, kind, start, end in wire.fields(raw, 0, len(raw)):
        if number == 1:
            name = wire.text(raw, kind, start, end, max_bytes=MAX_NAME)
        elif number == 2:
            wire.need(kind, 2)
            _parameter(raw, start, end, refused=_UNSUPPORTED_OUTPUT)
    return name


def write_infer_answer(answer: InferAnswer) -> bytes:
    """Writes ``ModelInferResponse``, with the outputs as ``raw_output_contents``."""
    parts = [_answer_head(answer.model, answer.version), wire.text_field(3, answer.id)]
    for name, array in answer.outputs.items():
        parts.append(_output_head(name, datatype_of(array.dtype), array.shape))
    for array in answer.outputs.values():
        content = np.ascontiguousarray(array)
        parts.append(_raw_head(content.nbytes))
        parts.append(content.tobytes())
    return b"".join(parts)


@lru_cache(maxsize=64)
def _answer_head(model: str, version: str) -> bytes:
    return wire.text_field(1, model) + wire.text_field(2, version)


@lru_cache(maxsize=256)
def _output_head(name: str, datatype: str, shape: tuple[int, ...]) -> bytes:
    return wire.bytes_field(5, _tensor(TensorSpec(name, datatype, shape)))


@lru_cache(maxsize=256)
def _raw_head(size: int) -> bytes:
    return b"\x32" + wire.varint_bytes(size)  # field 6, bytes


def _tensor(spec: TensorSpec) -> bytes:
    return (
        wire.text_field(1, spec.name)
        + wire.text_field(2, spec.datatype)
        + wire.shape_field(3, spec.shape)
    )


def write_stream_answer(answer: bytes, error: str = "") -> bytes:
    """Writes ``ModelStreamInferResponse``: an error, or a written ``ModelInferResponse``."""
    return wire.text_field(1, error) if error else wire.bytes_field(2, answer)


def write_ready(ready: bool) -> bytes:
    """Writes ``ServerLiveResponse``, ``ServerReadyResponse`` or ``ModelReadyResponse``."""
    return wire.bool_field(1, ready)


def write_health(serving: bool) -> bytes:
    """Writes ``grpc.health.v1.HealthCheckResponse``."""
    return b"\x08\x01" if serving else b"\x08\x02"


def write_server_metadata(name: str, version: str, extensions: Iterable[str]) -> bytes:
    """Writes ``ServerMetadataResponse``."""
    listed = b"".join(wire.text_field(3, extension) for extension in extensions)
    return wire.text_field(1, name) + wire.text_field(2, version) + listed


def write_model_metadata(model: ModelDescription) -> bytes:
    """Writes ``ModelMetadataResponse``."""
    return b"".join(
        (
            wire.text_field(1, model.name),
            wire.text_field(2, model.version),
            wire.text_field(3, model.platform),
            *(wire.bytes_field(4, _tensor(spec)) for spec in model.inputs),
            *(wire.bytes_field(5, _tensor(spec)) for spec in model.outputs),
        )
    )


def write_index(models: Iterable[ModelStatus]) -> bytes:
    """Writes ``RepositoryIndexResponse``."""
    rows = (
        wire.text_field(1, one.name)
        + wire.text_field(2, one.version)
        + wire.text_field(3, one.state)
        + wire.text_field(4, one.reason)
        for one in models
    )
    return b"".join(wire.bytes_field(1, row) for row in rows)


def read_texts(raw: bytes, numbers: Mapping[int, str]) -> dict[str, str]:
    """Reads the strings of a short request, by names of their fields; empty if absent.

    Raises:
        RequestRefused: it is malformed.
    """
    found = dict.fromkeys(numbers.values(), "")
    for number, kind, start, end in wire.fields(raw, 0, len(raw)):
        if number in numbers:
            found[numbers[number]] = wire.text(raw, kind, start, end, max_bytes=MAX_NAME)
    return found


def read_index_request(raw: bytes) -> bool:
    """Reads ``RepositoryIndexRequest``; returns whether only ready models are asked for."""
    ready = False
    for number, kind, start, end in wire.fields(raw, 0, len(raw)):
        if number == 2:
            wire.need(kind, 0)
            ready = wire.varint(raw, start, end)[0] != 0
    return ready


def read_load_request(raw: bytes) -> str:
    """Reads ``RepositoryModelLoadRequest`` or ``RepositoryModelUnloadRequest``: a model's name.

    Raises:
        RequestRefused: it is malformed; or it overrides the signed configuration or files, which
            only a release may change.
    """
    name = ""
    for number, kind, start, end in wire.fields(raw, 0, len(raw)):
        if number == 2:
            name = wire.text(raw, kind, start, end, max_bytes=MAX_NAME)
        elif number == 3:
            wire.need(kind, 2)
            _load_parameter(raw, start, end)
    return name


def _load_parameter(raw: bytes, begin: int, finish: int) -> None:
    for number, kind, start, end in wire.fields(raw, begin, finish):
        if number != 1:
            continue
        name = wire.text(raw, kind, start, end, max_bytes=MAX_NAME)
        if name != "unload_dependents":
            raise RequestRefused(
                f"load: parameter {foreign(name, 64)!r} is not offered: what is served comes "
                "from the signed release alone. Nothing was changed.",
                "unsupported",
            )
