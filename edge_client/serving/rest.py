"""The bodies of the Open Inference Protocol over HTTP: JSON, and the binary tensor extension.

Source: https://github.com/kserve/open-inference-protocol, and Triton's
``extension_binary_data.md``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import numpy as np

from edge_client.serving.messages import MAX_TENSORS, ModelDescription, ModelStatus
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

MAX_JSON_BYTES = 4 << 20
"""Longest JSON: as objects of Python it takes up to thirty times the room."""
HEADER_LENGTH = "inference-header-content-length"
_REFUSED = ("sequence_id", "sequence_start", "sequence_end", "shared_memory_region")
_NUMBERS = {int, float, bool, type(None)}
_REFUSED_OUTPUT = ("classification", "shared_memory_region")


class Wanted:
    """Which outputs a request wants as binary data."""

    def __init__(self, every: bool, chosen: Mapping[str, bool]) -> None:
        """``chosen`` has the outputs that say so themselves; ``every`` is for the others."""
        self._every, self._chosen = every, chosen

    def binary(self, name: str) -> bool:
        """Returns whether an output goes out as binary data."""
        return self._chosen.get(name, self._every)


def _invalid(what: str) -> RequestRefused:
    return RequestRefused(f"request: {what}. Nothing was answered.")


def parse_json(raw: bytes | memoryview) -> dict[str, Any]:
    """Parses a JSON object.

    Raises:
        RequestRefused: it is something else, or longer than `MAX_JSON_BYTES`.
    """
    if len(raw) > MAX_JSON_BYTES:
        raise RequestRefused(
            f"request: its JSON has {len(raw)} bytes, more than the {MAX_JSON_BYTES} allowed. "
            "Nothing was answered; send tensors as binary data.",
            "too_large",
        )
    try:
        found = json.loads(bytes(raw))
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise _invalid(f"expected JSON: {foreign(error, 100)}") from None
    if not isinstance(found, dict):
        raise _invalid(f"expected a JSON object, got {type(found).__name__}")
    return found


def read_infer_request(
    model: str, version: str, body: bytes, header_bytes: int | None
) -> tuple[InferRequest, Wanted]:
    """Reads the body of an inference request.

    Args:
        model: From the path.
        version: From the path; empty for any.
        body: JSON, then binary data of tensors.
        header_bytes: Length of the JSON, from the header of that name; None for all of the body.

    Raises:
        RequestRefused: it is malformed, or asks for something that is not offered.
    """
    length = len(body) if header_bytes is None else header_bytes
    if not 0 <= length <= len(body):
        raise _invalid(f"{HEADER_LENGTH} is {length}, but the body has {len(body)} bytes")
    view = memoryview(body)
    found = parse_json(view[:length])
    parameters = _parameters(found, _REFUSED)
    tensors, at = [], length
    for one in _objects(found, "inputs"):
        tensor, at = _tensor(one, view, at)
        tensors.append(tensor)
    if at != len(body):
        raise _invalid(f"{len(body) - at} bytes of binary data belong to no input")
    chosen: dict[str, bool] = {}
    outputs = []
    for one in _objects(found, "outputs"):
        name = _name(one, "name", required=True)
        outputs.append(name)
        binary = _parameters(one, _REFUSED_OUTPUT).get("binary_data")
        if binary is not None:
            chosen[name] = _flag(binary, "binary_data")
    every = _flag(parameters.get("binary_data_output", False), "binary_data_output")
    timeout = parameters.get("timeout", 0)
    if type(timeout) is not int or not 0 <= timeout < 1 << 63:
        raise _invalid("parameter timeout: expected microseconds, a whole number")
    request = InferRequest(
        model=model,
        version=version,
        id=_name(found, "id"),
        tensors=tensors,
        outputs=outputs,
        timeout_us=timeout,
        received_bytes=len(body),
    )
    return request, Wanted(every, chosen)


def _objects(found: Mapping[str, Any], key: str) -> list[dict[str, Any]]:
    listed = found.get(key, [])
    valid = isinstance(listed, list) and all(isinstance(one, dict) for one in listed)
    if not valid or len(listed) > MAX_TENSORS:
        raise _invalid(f"{key}: expected a list of at most {MAX_TENSORS} objects")
    return list(listed)


def _name(found: Mapping[str, Any], key: str, *, required: bool = False) -> str:
    value = found.get(key, "")
    if not isinstance(value, str) or len(value) > MAX_NAME or (required and not value):
        raise _invalid(f"{key}: expected a string of at most {MAX_NAME} characters")
    return value


def _flag(value: object, name: str) -> bool:
    if not isinstance(value, bool):
        raise _invalid(f"parameter {name}: expected true or false")
    return value


def _parameters(found: Mapping[str, Any], refused: tuple[str, ...]) -> dict[str, Any]:
    parameters = found.get("parameters", {})
    if not isinstance(parameters, dict):
        raise _invalid("parameters: expected an object")
    for name in refused:
        if name in parameters:
            raise RequestRefused(
                f"request: parameter {name!r} is not offered. Nothing was answered; send the "
                "request without it.",
                "unsupported",
            )
    return parameters


def _tensor(one: Mapping[str, Any], view: memoryview, at: int) -> tuple[Tensor, int]:
    name, datatype = _name(one, "name", required=True), _name(one, "datatype", required=True)
    shape = one.get("shape")
    valid = (
        isinstance(shape, list)
        and len(shape) <= MAX_DIMENSIONS
        and all(type(size) is int and -(1 << 63) <= size < 1 << 63 for size in shape)
    )
    if not valid:
        raise _invalid(
            f"input {foreign(name, 64)!r}: shape: expected a list of at most {MAX_DIMENSIONS} "
            "whole numbers"
        )
    assert isinstance(shape, list)
    size = _parameters(one, _REFUSED).get("binary_data_size")
    if size is None:
        return Tensor(name, datatype, tuple(shape), elements=_elements(one, name)), at
    if type(size) is not int or not 0 <= size <= len(view) - at:
        raise _invalid(
            f"input {foreign(name, 64)!r}: binary_data_size: expected at most the "
            f"{len(view) - at} bytes that follow"
        )
    if "data" in one:
        raise _invalid(f"input {foreign(name, 64)!r}: it has both data and binary data")
    return Tensor(name, datatype, tuple(shape), raw=view[at : at + size]), at + size


def _elements(one: Mapping[str, Any], name: str) -> AnyArray:
    data, found = one.get("data", []), None
    data = data if isinstance(data, list) else [data]
    # Before NumPy looks: it would give each element the room of the longest text among them.
    if _are_numbers(data, MAX_DIMENSIONS):
        with suppress(ValueError, OverflowError):  # lists of unequal length
            found = np.asarray(data)
    if found is not None and found.dtype.kind == "O":
        found = _with_missing(found)
    if found is None or found.dtype.kind not in "biuf":
        raise _invalid(
            f"input {foreign(name, 64)!r}: data: expected numbers, flat or as nested lists of "
            "equal lengths, with null for a missing one"
        )
    return found.reshape(-1)


def _are_numbers(values: list[Any], depth: int) -> bool:
    """Returns whether JSON's lists, nested at most ``depth`` deep, hold nothing but numbers."""
    kinds = set(map(type, values))
    if kinds == {list} and depth > 1:
        return all(_are_numbers(each, depth - 1) for each in values)
    return kinds <= _NUMBERS


def _with_missing(values: AnyArray) -> AnyArray:
    """Returns numbers with JSON's ``null`` as NaN."""
    try:
        return values.astype(np.float64)
    except OverflowError:  # a whole number beyond float64
        return values


def write_infer_answer(answer: InferAnswer, wanted: Wanted) -> tuple[bytes, int | None]:
    """Writes the body of an answer.

    Returns:
        The body, and the length of its JSON if binary data follow.

    Raises:
        RequestRefused: an output that goes out as JSON is not finite.
    """
    outputs, pieces = [], []
    for name, array in answer.outputs.items():
        described: dict[str, Any] = {
            "name": name,
            "datatype": datatype_of(array.dtype),
            "shape": array.shape,
        }
        if wanted.binary(name):
            piece = np.ascontiguousarray(array).tobytes()
            described["parameters"] = {"binary_data_size": len(piece)}
            pieces.append(piece)
        else:
            if array.dtype.kind == "f" and not np.isfinite(array).all():
                raise RequestRefused(
                    f"output {name!r}: the model answered with a number that is not finite, which "
                    "JSON has no form for. Ask for it as binary data.",
                    "failed",
                )
            described["data"] = array.ravel().tolist()
        outputs.append(described)
    head: dict[str, Any] = {"model_name": answer.model, "model_version": answer.version}
    if answer.id:
        head["id"] = answer.id
    raw = json.dumps({**head, "outputs": outputs}, separators=(",", ":")).encode()
    return (b"".join([raw, *pieces]), len(raw)) if pieces else (raw, None)


def model_metadata(model: ModelDescription) -> dict[str, Any]:
    """Returns a model's metadata as JSON values."""
    return {
        "name": model.name,
        "versions": [model.version],
        "platform": model.platform,
        "inputs": [_spec(spec) for spec in model.inputs],
        "outputs": [_spec(spec) for spec in model.outputs],
    }


def _spec(spec: TensorSpec) -> dict[str, Any]:
    return {"name": spec.name, "datatype": spec.datatype, "shape": list(spec.shape)}


def index(models: list[ModelStatus]) -> list[dict[str, Any]]:
    """Returns the repository's index as JSON values."""
    return [
        {"name": one.name, "version": one.version, "state": one.state, "reason": one.reason}
        for one in models
    ]
