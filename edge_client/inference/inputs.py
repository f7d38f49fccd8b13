"""Inference inputs from JSON or arrays, checked against a model's manifest."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fedcore.artifacts.golden import AnyArray
from fedcore.artifacts.manifest import Manifest
from fedcore.errors import DataError
from fedcore.files import read_bytes

MAX_INPUT_BYTES = 64 << 20  # 64 MiB of JSON


def read_text(where: str) -> bytes:
    """Reads a file, or standard input if ``where`` is ``-``.

    Raises:
        DataError: the file does not exist, or there are more than `MAX_INPUT_BYTES`.
    """
    if where != "-":
        return read_bytes(Path(where), max_bytes=MAX_INPUT_BYTES, what="a JSON list of inputs")
    raw = sys.stdin.buffer.read(MAX_INPUT_BYTES + 1)
    if len(raw) > MAX_INPUT_BYTES:
        raise DataError(
            f"standard input: got more than the {MAX_INPUT_BYTES} bytes allowed. Nothing was "
            "answered; send the inputs in parts."
        )
    return raw


def parse_inputs(raw: bytes, manifest: Manifest, *, where: str) -> AnyArray:
    """Parses one input or a batch of them from JSON.

    Args:
        raw: One input as nested lists of numbers, or a JSON list of inputs; ``null`` or NaN for a
            missing number, if the model takes it.
        manifest: The model's manifest.
        where: Source of the inputs, for errors.

    Returns:
        Shape ``(B, *input_shape)``, dtype ``input_dtype``; one input is a batch of one.

    Raises:
        DataError: the JSON is malformed or of another shape, or a number is not finite or does not
            fit the type.
    """
    shape = list(manifest.input_shape)
    expected = f"expected one input of shape {shape}, or a JSON list of inputs of this shape"
    try:
        batch = array_of(json.loads(raw))
    except (ValueError, RecursionError) as error:  # no JSON, or no array of numbers
        raise DataError(f"{where}: {expected}: {error}. Nothing was answered.") from None
    batch = batch[None] if batch.shape == manifest.input_shape else batch
    return as_batch(batch, manifest, expected=f"{where}: {expected}")


def as_batch(batch: AnyArray, manifest: Manifest, *, expected: str) -> AnyArray:
    """Checks a batch of inputs, and converts it to the model's input type.

    Args:
        batch: Shape ``(B, *input_shape)``, numbers; or booleans, for a model that takes them.
        manifest: The model's manifest.
        expected: Start of an error: the source of the inputs and what was expected.

    Returns:
        Shape ``(B, *input_shape)``, dtype ``input_dtype``.

    Raises:
        DataError: the batch is empty or of another shape, or a number does not fit the type, or
            is not finite and no missing value that the model takes.
    """
    if batch.ndim == 0 or len(batch) == 0 or batch.shape[1:] != manifest.input_shape:
        raise DataError(f"{expected}, got shape {list(batch.shape)}. Nothing was answered.")
    dtype = np.dtype(manifest.input_dtype)
    with np.errstate(over="ignore", invalid="ignore"):
        known = batch.dtype.kind in "iuf" or batch.dtype == dtype  # bools are not for other models
        converted = batch.astype(dtype) if known else None
    if converted is None or (dtype.kind != "f" and not np.array_equal(converted, batch)):
        raise DataError(
            f"{expected}, finite and of type {dtype}, got {batch.dtype} with values that this "
            "type cannot represent. Nothing was answered."
        )
    demand_finite(converted, batch, manifest, expected)
    return converted


def demand_finite(converted: AnyArray, given: AnyArray, manifest: Manifest, expected: str) -> None:
    """Checks that numbers are finite, except for NaN where the model takes it as missing.

    Args:
        converted: Inputs ``(B, ...)`` in the model's type.
        given: The inputs as somebody gave them.
        manifest: The model's manifest.
        expected: Start of an error: the source of the inputs and what was expected.

    Raises:
        DataError: a number is not finite.
    """
    if converted.dtype.kind != "f":
        return
    odd = ~np.isfinite(converted)
    missing = np.isnan(given) if given.dtype.kind == "f" else np.zeros_like(odd)
    if manifest.missing == "all":
        odd &= ~missing
    elif manifest.missing is not None:
        allowed = np.zeros(int(np.prod(manifest.input_shape, dtype=np.int64)), dtype=bool)
        allowed[[place for place in manifest.missing if place < allowed.size]] = True
        odd &= ~(missing & allowed.reshape(manifest.input_shape))
    if not odd.any():
        return
    row, *place = (int(number) for number in np.argwhere(odd)[0])
    at = f", column {place[0]}" if len(place) == 1 else f", position {place}" if place else ""
    value = given[(row, *place)]
    why = (
        "this model takes no missing value there"
        if np.isnan(value)
        else f"{converted.dtype} cannot represent it as a finite number"
    )
    raise DataError(
        f"{expected}, finite and of type {converted.dtype}, got {value} in input {row}{at}: {why}. "
        "Nothing was answered."
    )


def array_of(values: Any) -> AnyArray:
    """Returns nested lists of numbers as an array, with NaN for None; and any other array as it is.

    Raises:
        ValueError: there is text among them, lists have unequal lengths, or float64 cannot hold a
            whole number.
    """
    # NumPy would give each number the room of the longest text beside it.
    if isinstance(values, list | tuple) and _hold_text(values):
        raise ValueError("text among the numbers")
    found = np.asarray(values)
    if found.dtype.kind != "O":
        return found
    if not all(one is None or type(one) in (int, float) for one in found.flat):
        return found
    try:
        return found.astype(np.float64)
    except OverflowError:
        raise ValueError("a whole number that float64 cannot hold") from None


def _hold_text(values: Sequence[Any], depth: int = 64) -> bool:
    """Returns whether nested lists hold text, as deep as NumPy looks."""
    kinds = set(map(type, values))
    if any(issubclass(kind, str | bytes | bytearray) for kind in kinds):
        return True
    nested = any(issubclass(kind, list | tuple) for kind in kinds) and depth > 1
    return nested and any(
        _hold_text(each, depth - 1) for each in values if isinstance(each, list | tuple)
    )
