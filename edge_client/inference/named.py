"""Inputs and outputs by name, each side of a model one vector that its manifest describes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from math import prod
from typing import Any

import numpy as np

from edge_client.inference.inputs import array_of, demand_finite, parse_inputs
from edge_client.inference.responses import Interface, TensorInfo
from fedcore.artifacts.golden import AnyArray
from fedcore.artifacts.manifest import Manifest, NamedOutput, NamedTensor
from fedcore.artifacts.parity import FloatArray
from fedcore.errors import DataError, DeviceError
from fedcore.observability.foreign import foreign


def parse_any(raw: bytes, manifest: Manifest, *, where: str) -> AnyArray:
    """Parses one input or a batch of them from JSON, with names where the model has them.

    Args:
        raw: For a model with named inputs an object of one example or of a batch, or a list of
            objects of one example each; for others see `edge_client.inference.inputs.parse_inputs`.
        manifest: The model's manifest.
        where: Source of the inputs, for errors.

    Returns:
        Shape ``(B, *input_shape)``, dtype ``input_dtype``.

    Raises:
        DataError: the JSON is malformed, or names, shapes or numbers are not the model's.
    """
    if manifest.inputs is None:
        return parse_inputs(raw, manifest, where=where)
    try:
        found = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{where}: expected JSON objects of named inputs: {error}. Nothing was answered."
        ) from None
    if isinstance(found, dict):
        return packed(manifest, found, where=where)[0]
    if isinstance(found, list) and found and all(isinstance(each, dict) for each in found):
        rows = [packed(manifest, each, where=f"{where}, {n}") for n, each in enumerate(found)]
        if all(alone for _, alone in rows):
            return np.concatenate([vectors for vectors, _ in rows])
    raise DataError(
        f"{where}: expected an object with {', '.join(each.name for each in manifest.inputs)}, or "
        "a list of such objects of one example each. Nothing was answered."
    )


def packed(manifest: Manifest, inputs: Mapping[Any, Any], *, where: str) -> tuple[AnyArray, bool]:
    """Returns named inputs as a batch of the vectors that a model takes.

    Args:
        manifest: The manifest of a model with named inputs.
        inputs: A value for each input: of its shape for one example, ``(B, ...)`` for a batch.
        where: Source of the inputs, for errors.

    Returns:
        Vectors ``(B, N)`` of the model's type, and whether ``inputs`` was one example.

    Raises:
        DataError: names, shapes or types differ from the manifest's, or a number is not finite.
    """
    specs = manifest.inputs or ()
    wanted = ", ".join(each.name for each in specs)
    if set(inputs) != {each.name for each in specs}:
        raise DataError(
            f"{where}: expected the inputs {wanted}, got {foreign(', '.join(map(str, inputs)))}. "
            "Nothing was answered."
        )
    values = [_array(inputs[each.name], each, where) for each in specs]
    alone = all(value.shape == each.shape for value, each in zip(values, specs, strict=True))
    batches = [value[None] for value in values] if alone else values
    rows = len(batches[0]) if batches[0].ndim else 0
    parts = [
        _part(batch, each, rows, where).reshape(rows, -1)
        for batch, each in zip(batches, specs, strict=True)
    ]
    vectors = np.concatenate([part.astype(manifest.input_dtype) for part in parts], axis=1)
    given = np.concatenate([batch.reshape(rows, -1) for batch in batches], axis=1)
    demand_finite(vectors, given, manifest, f"{where}: expected {wanted}, one after the other")
    return vectors, alone


def unpacked(manifest: Manifest, vectors: AnyArray) -> dict[str, AnyArray]:
    """Returns the named inputs that vectors ``(B, N)`` hold, each ``(B, ...)`` in its own type."""
    found, start = {}, 0
    for each in manifest.inputs or ():
        size = prod(each.shape)
        part = vectors[:, start : start + size].reshape(-1, *each.shape)
        found[each.name] = part.astype(each.dtype)
        start += size
    return found


def stated(manifest: Manifest, found: Interface) -> Interface:
    """Returns the inputs and outputs that a manifest names, or else those of the file."""
    inputs, outputs = found.inputs, found.outputs
    if manifest.inputs is not None:
        inputs = tuple(TensorInfo(e.name, e.dtype, (-1, *e.shape)) for e in manifest.inputs)
    if manifest.outputs is not None:
        dtype = outputs[0].dtype
        outputs = tuple(TensorInfo(e.name, dtype, (-1, *e.shape)) for e in manifest.outputs)
    return replace(found, inputs=inputs, outputs=outputs)


ONLY = "output"
"""The name of the only output of a model."""


def outputs_by_name(manifest: Manifest, outputs: FloatArray) -> dict[str, FloatArray]:
    """Returns the outputs ``(B, ...)`` by name: those of the manifest, or ``output`` alone.

    Raises:
        DeviceError: the outputs are not the vectors that the manifest describes.
    """
    if manifest.outputs is None:
        return {ONLY: outputs}
    sizes = [prod(each.shape) for each in manifest.outputs]
    if outputs.ndim != 2 or outputs.shape[1] != sum(sizes):
        raise DeviceError(
            f"model {manifest.model!r} version {manifest.version}: its outputs have shape "
            f"{outputs.shape[1:]}, and its manifest describes {sum(sizes)} numbers. Nothing was "
            "answered; report this to its publisher."
        )
    parts = np.split(outputs, np.cumsum(sizes)[:-1], axis=1)
    return {
        each.name: part.reshape(len(outputs), *each.shape)
        for each, part in zip(manifest.outputs, parts, strict=True)
    }


def output_named(manifest: Manifest, name: str) -> NamedOutput:
    """Returns one of several outputs that the manifest names.

    Raises:
        DataError: it names no such output.
    """
    found = {each.name: each for each in manifest.outputs or ()}
    if name not in found:
        raise DataError(
            f"model {manifest.model!r} version {manifest.version}: it has no output "
            f"{foreign(name, 64)!r}, but {', '.join(found) or 'one without a name'}. Nothing was "
            "answered."
        )
    return found[name]


def _array(value: Any, spec: NamedTensor, where: str) -> AnyArray:
    try:
        return array_of(value)
    except ValueError as error:  # no array of numbers
        raise DataError(f"{where}: input {spec.name!r}: {error}. Nothing was answered.") from None


def _part(batch: AnyArray, spec: NamedTensor, rows: int, where: str) -> AnyArray:
    """Returns a batch of one input in its type, after checking that it means the same there."""
    expected = f"{where}: input {spec.name!r}: expected shape {[rows, *spec.shape]}"
    if batch.shape != (rows, *spec.shape) or not rows:
        raise DataError(
            f"{expected} of a batch, or {list(spec.shape)} of one input, got "
            f"{list(batch.shape)}. Nothing was answered."
        )
    dtype = np.dtype(spec.dtype)
    with np.errstate(over="ignore", invalid="ignore"):
        known = batch.dtype.kind in "iuf" or batch.dtype == dtype
        converted = batch.astype(dtype) if known else None
    if converted is None or (dtype.kind != "f" and not np.array_equal(converted, batch)):
        raise DataError(
            f"{expected} and type {dtype}, got {batch.dtype} with values that this type cannot "
            "represent. Nothing was answered."
        )
    return converted
