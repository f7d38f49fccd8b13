"""Parses the answers of a model's process, which the model may have taken over: trusts nothing."""

from __future__ import annotations

import json
import math
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np

from fedcore.artifacts.golden import AnyArray
from fedcore.errors import DeviceError, LimitExceeded
from fedcore.observability.foreign import foreign

MAX_HEAD_BYTES = 1 << 16
MAX_OUTPUT_BYTES = 256 << 20
_MAX_TENSORS = 64
_MAX_DIMENSIONS = 32
_MAX_NAME = 200
_NOT_PARSED = (ValueError, TypeError, LookupError, ArithmeticError, RecursionError)
_BITS = (8, 16, 32, 64)
_TYPES = {
    "tensor(float)": "float32",
    "tensor(double)": "float64",
    "tensor(float16)": "float16",
    "tensor(bool)": "bool",
    **{f"tensor({kind}{bits})": f"{kind}{bits}" for kind in ("int", "uint") for bits in _BITS},
}


@dataclass(frozen=True)
class TensorInfo:
    """What a model takes or gives under one name."""

    name: str
    dtype: str
    """NumPy's name of the type."""
    shape: tuple[int, ...]
    """With the batch dimension; -1 where the size is free."""


@dataclass(frozen=True)
class Interface:
    """Inputs and outputs of a model, as onnxruntime names them."""

    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]


@dataclass(frozen=True)
class ArrayHead:
    """Announces an array of an answer."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the array that follow the head."""
        return math.prod(self.shape) * self.dtype.itemsize


def head_of(line: bytes, of: str) -> dict[str, Any]:
    """Parses the line of JSON that an answer begins with.

    Args:
        line: The line.
        of: The model, for errors.

    Raises:
        DeviceError: the line is malformed.
    """
    try:
        head: Any = json.loads(line)
        if not isinstance(head, dict):
            raise TypeError(f"a response of type {type(head).__name__}")
    except _NOT_PARSED as error:
        raise malformed(of, error) from error
    return head


def interface_of(head: Mapping[str, Any], of: str) -> Interface:
    """Parses the first answer of a model's process.

    Raises:
        DeviceError: it is malformed.
    """
    try:
        return Interface(*(_tensors(head[key]) for key in ("inputs", "outputs")))
    except _NOT_PARSED as error:
        raise malformed(of, error) from error


def array_heads(head: Mapping[str, Any], of: str, rows: int | None) -> list[ArrayHead]:
    """Parses the head of an answer: the type and shape of each output.

    Args:
        head: What `head_of` returned.
        of: The model, for errors.
        rows: Rows that each output must have; None for any number.

    Raises:
        DeviceError: it is malformed, or announces too much.
    """
    try:
        arrays = head["arrays"]
        if not isinstance(arrays, list) or not 1 <= len(arrays) <= _MAX_TENSORS:
            raise ValueError("expected a list of arrays")
        found = [_array_head(each, rows) for each in arrays]
        if sum(each.nbytes for each in found) > MAX_OUTPUT_BYTES:
            raise ValueError(f"more than {MAX_OUTPUT_BYTES} bytes of outputs")
    except _NOT_PARSED as error:
        raise malformed(of, error) from error
    return found


def arrays_of(heads: Sequence[ArrayHead], raw: bytearray) -> list[AnyArray]:
    """Returns the arrays that heads announce, from exactly their bytes; they own their memory."""
    found, place = [], 0
    for head in heads:
        part = memoryview(raw)[place : place + head.nbytes]
        found.append(np.frombuffer(part, head.dtype).reshape(head.shape).copy())
        place += head.nbytes
    return found


def explain_fault(head: Mapping[str, Any], of: str, memory_bytes: int) -> NoReturn:
    """Raises the error for a fault that a model's process reports.

    Args:
        head: What `head_of` returned, with ``fault``.
        of: The model, for errors.
        memory_bytes: The process's limit, for errors.

    Raises:
        LimitExceeded, DeviceError: always.
    """
    fault, text = str(head["fault"]), foreign(head.get("text", ""))
    if fault == "memory":
        raise LimitExceeded(
            f"{of}: it needs more than {memory_bytes >> 20} MiB, this device's memory limit "
            f"({text}). --max-memory-mib allows more (from Python, ModelLimits.memory_bytes)."
        )
    if fault == "output":
        raise LimitExceeded(
            f"{of}: its outputs have {text}, which is not allowed. Nothing was answered; send "
            "fewer inputs at a time."
        )
    if fault == "file":
        raise DeviceError(
            f"{of}: its file has just changed ({text}); an update may have replaced it. Nothing "
            "was answered; run again."
        )
    if fault == "load":
        raise DeviceError(
            f"{of}: onnxruntime on this device cannot run it: {text}. It does not serve."
        )
    raise DeviceError(f"{of}: onnxruntime failed: {text}. Nothing was answered.")


def explain_end(status: int, of: str, memory_bytes: int) -> NoReturn:
    """Raises the error for a process that ended with a status before it had answered."""
    if status == -signal.SIGXCPU:
        raise LimitExceeded(
            f"{of}: it used more CPU time than this device's time limit allows, and was stopped. "
            "--max-seconds allows more (from Python, ModelLimits.seconds)."
        )
    if status == 0:
        raise malformed(of, ValueError("it ended before it had answered"))
    how = signal.strsignal(-status) if status < 0 else f"exit code {status}"
    raise DeviceError(
        f"{of}: it crashed onnxruntime ({how}), as a model that needs more than the "
        f"{memory_bytes >> 20} MiB allowed, or a broken one, can. Nothing was answered."
    )


def malformed(of: str, error: Exception) -> DeviceError:
    """Returns the error for an answer that cannot be what the child process writes."""
    return DeviceError(
        f"{of}: its response is malformed ({type(error).__name__}: {foreign(error, 200)}). "
        "Nothing was answered."
    )


def _array_head(said: Any, rows: int | None) -> ArrayHead:
    dtype = np.dtype(str(said["dtype"]))
    shape = tuple(int(size) for size in said["shape"])
    if dtype.kind not in "fiub":
        raise ValueError(f"outputs of type {dtype}")
    if any(size < 0 for size in shape) or len(shape) > _MAX_DIMENSIONS:
        raise ValueError(f"outputs of shape {shape}")
    if not shape or (rows is not None and shape[0] != rows):
        raise ValueError(f"expected {rows} rows, outputs of shape {shape}, type {dtype}")
    return ArrayHead(dtype, shape)


def _tensors(said: Any) -> tuple[TensorInfo, ...]:
    if not isinstance(said, list) or not 1 <= len(said) <= _MAX_TENSORS:
        raise ValueError("expected a list of tensors")
    return tuple(_tensor(*each) for each in said)


def _tensor(name: Any, kind: Any, dims: Any) -> TensorInfo:
    text = foreign(str(name), _MAX_NAME)
    if text != name:
        raise ValueError(f"a tensor is named {text}")
    dtype = _TYPES.get(str(kind), foreign(str(kind), 50))
    if len(dims) > _MAX_DIMENSIONS:
        raise ValueError(f"a tensor of {len(dims)} dimensions")
    sizes = tuple(size if type(size) is int and size >= 0 else -1 for size in dims)
    return TensorInfo(text, dtype, sizes)
