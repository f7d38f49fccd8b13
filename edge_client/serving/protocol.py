"""Terms of the Open Inference Protocol that gRPC and HTTP share: tensors, requests and answers.

Source: https://github.com/kserve/open-inference-protocol, version 2.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fedcore.artifacts.golden import AnyArray
from fedcore.errors import RequestRefused
from fedcore.observability.foreign import foreign

DATATYPES: Mapping[str, np.dtype[Any]] = {
    "BOOL": np.dtype(np.bool_),
    "UINT8": np.dtype("<u1"),
    "UINT16": np.dtype("<u2"),
    "UINT32": np.dtype("<u4"),
    "UINT64": np.dtype("<u8"),
    "INT8": np.dtype("<i1"),
    "INT16": np.dtype("<i2"),
    "INT32": np.dtype("<i4"),
    "INT64": np.dtype("<i8"),
    "FP16": np.dtype("<f2"),
    "FP32": np.dtype("<f4"),
    "FP64": np.dtype("<f8"),
}
"""The protocol's names of types. ``BYTES`` and ``BF16`` are missing: no model here takes them."""
_NAMES = {dtype: name for name, dtype in DATATYPES.items()}
MAX_DIMENSIONS = 16
MAX_NAME = 256
"""Most characters of a name, a version or an id in a request."""


def datatype_of(dtype: np.dtype[Any]) -> str:
    """Returns the protocol's name of a NumPy type.

    Raises:
        KeyError: the protocol has no name for it.
    """
    return _NAMES[dtype.newbyteorder("<")]


@dataclass(frozen=True)
class TensorSpec:
    """Name, type and shape of a model's input or output."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    """With -1 for the batch, which comes first, and for every other length that may vary."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """The NumPy type."""
        return DATATYPES[self.datatype]


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor of a request, before it is compared with the model's input."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    raw: bytes | memoryview | None = None
    """Little-endian elements in row-major order; None if they are in ``elements``."""
    elements: AnyArray | None = None
    """Elements that were sent as numbers of some type, flat; None if they are in ``raw``."""


@dataclass(frozen=True, slots=True)
class InferRequest:
    """A request as it was read from either transport, before it is compared with the model."""

    model: str
    version: str
    id: str
    tensors: Sequence[Tensor]
    outputs: Sequence[str] = ()
    """Names of the outputs to return; all if empty."""
    timeout_us: int = 0
    """How long the sender will wait, in microseconds; 0 for as long as it takes."""
    received_bytes: int = 0
    """Length of the message, which stays in memory while a tensor refers to it."""


@dataclass(frozen=True, slots=True)
class InferAnswer:
    """What the model answered to one request."""

    model: str
    version: str
    """The version that computed every output."""
    id: str
    outputs: Mapping[str, AnyArray] = field(default_factory=dict)


def checked_inputs(
    request: InferRequest, specs: Sequence[TensorSpec], *, max_rows: int
) -> dict[str, AnyArray]:
    """Returns a request's inputs as arrays over its own bytes, which are checked first.

    Guarantee:
        Nothing is allocated by a size that a request declares: a declared size must be that of the
        bytes that came with it.

    Args:
        request: The request; its tensors may be anything.
        specs: The model's inputs.
        max_rows: Most rows of a batch.

    Raises:
        RequestRefused: a name, type or shape does not fit, or there are more or fewer bytes than
            the shape says.
    """
    found = {tensor.name: tensor for tensor in request.tensors}
    expected = [spec.name for spec in specs]
    if len(found) != len(request.tensors) or sorted(found) != sorted(expected):
        names = ", ".join(foreign(tensor.name, 64) for tensor in request.tensors[:8])
        raise RequestRefused(
            f"model {request.model!r}: expected inputs {', '.join(expected)}, each once, got "
            f"{names or 'none'}. Nothing was answered."
        )
    arrays = {spec.name: _array(found[spec.name], spec, max_rows) for spec in specs}
    rows = {len(array) for array in arrays.values()}
    if len(rows) > 1:
        raise RequestRefused(
            f"model {request.model!r}: its inputs have batches of {sorted(rows)} rows, expected "
            "as many rows of each. Nothing was answered."
        )
    return arrays


def _array(tensor: Tensor, spec: TensorSpec, max_rows: int) -> AnyArray:
    shape = tensor.shape
    if tensor.datatype != spec.datatype:
        raise RequestRefused(
            f"input {spec.name!r}: expected datatype {spec.datatype}, got "
            f"{foreign(tensor.datatype, 32)!r}. Nothing was answered."
        )
    fits = len(shape) == len(spec.shape) and all(
        size > 0 if want == -1 else size == want
        for size, want in zip(shape, spec.shape, strict=True)
    )
    if not fits:
        raise RequestRefused(
            f"input {spec.name!r}: expected shape {list(spec.shape)} with any number of rows for "
            f"-1, got {list(shape[:MAX_DIMENSIONS])}. Nothing was answered."
        )
    if shape[0] > max_rows:
        raise RequestRefused(
            f"input {spec.name!r}: a request has {shape[0]} rows, more than the {max_rows} "
            "allowed. Nothing was answered; send them in parts.",
            "too_large",
        )
    count = math.prod(shape)
    if tensor.elements is not None:
        return _converted(tensor.elements, spec, shape, count)
    raw = b"" if tensor.raw is None else tensor.raw
    if len(raw) != count * spec.dtype.itemsize:
        raise RequestRefused(
            f"input {spec.name!r}: shape {list(shape)} of {spec.datatype} takes "
            f"{count * spec.dtype.itemsize} bytes, got {len(raw)}. Nothing was answered."
        )
    if spec.datatype == "BOOL" and np.frombuffer(raw, np.uint8).max(initial=0) > 1:
        raise RequestRefused(
            f"input {spec.name!r}: a byte of BOOL is neither 0 nor 1. Nothing was answered."
        )
    return np.frombuffer(raw, spec.dtype).reshape(shape)


def _converted(
    elements: AnyArray, spec: TensorSpec, shape: tuple[int, ...], count: int
) -> AnyArray:
    """Returns numbers of any type as the input's type, if each of them fits."""
    if elements.size != count:
        raise RequestRefused(
            f"input {spec.name!r}: shape {list(shape)} takes {count} elements, got "
            f"{elements.size}. Nothing was answered."
        )
    kinds = {"f": "iuf", "b": "b"}.get(spec.dtype.kind, "iu")
    fits = elements.dtype.kind in kinds
    if fits:
        with np.errstate(over="ignore", invalid="ignore"):
            converted = elements.astype(spec.dtype)
        fits = spec.dtype.kind == "f" or bool(np.array_equal(converted, elements))
    if not fits:
        raise RequestRefused(
            f"input {spec.name!r}: expected elements of {spec.datatype}, got {elements.dtype} "
            "with values that it cannot represent. Nothing was answered."
        )
    return converted.reshape(shape)
