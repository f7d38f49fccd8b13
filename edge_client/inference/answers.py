"""Model outputs as text: labels, numbers or tokens, one line per input, or JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator

import numpy as np

from fedcore.artifacts.manifest import Manifest
from fedcore.artifacts.parity import FloatArray
from fedcore.errors import DeviceError, LimitExceeded
from fedcore.observability.foreign import foreign
from fedcore.observability.words import counted

MAX_PRINTED = 4_000_000
"""Most numbers in one answer: 100 MB of text."""
_PIECE = 1 << 16


def answers(manifest: Manifest, outputs: FloatArray) -> Iterable[str]:
    """Returns one line per input: the class, the values, or the likeliest token at each position.

    Lines are made lazily: a byte of output can take 20 bytes as text, and 50 in Python lists.

    Args:
        manifest: The model's manifest.
        outputs: Shape ``(B, ...)``.

    Raises:
        DeviceError: the outputs' shape does not fit the kind of model.
        LimitExceeded: more than `MAX_PRINTED` numbers would be printed.
    """
    _check_shape(manifest, outputs)
    if manifest.kind == "classification":
        found = labels(manifest, outputs)
        return (foreign(label) for label in found)
    rows = outputs if manifest.kind == "regression" else outputs.argmax(axis=-1)
    _check_size(manifest, rows)
    return (" ".join(f"{number:.6g}" for number in np.ravel(row)) for row in rows)


def answer_lines(manifest: Manifest, outputs: FloatArray) -> Iterator[str]:
    """Yields the lines of one JSON object: model, version, outputs, and a classifier's labels.

    Converts a limited number of outputs to text at a time, to save memory.

    Args:
        manifest: The model's manifest.
        outputs: Shape ``(B, ...)``.

    Raises:
        DeviceError: the outputs' shape does not fit the kind of model; nothing was yielded.
        LimitExceeded: there are more than `MAX_PRINTED` numbers; nothing was yielded.
    """
    _check_shape(manifest, outputs)
    _check_size(manifest, outputs)
    head = json.dumps({"model": manifest.model, "version": manifest.version})
    yield head[:-1] + ', "outputs":'
    yield from _array_lines(outputs)
    if manifest.kind == "classification":
        yield ', "labels":'
        yield from _list_lines(json.dumps(name) for name in labels(manifest, outputs))
    yield "}"


def _array_lines(values: FloatArray) -> Iterator[str]:
    if values.size <= _PIECE:
        yield json.dumps(values.tolist())
    elif values.ndim == 1:
        pieces = (values[start : start + _PIECE] for start in range(0, len(values), _PIECE))
        yield from _list_lines(json.dumps(piece.tolist())[1:-1] for piece in pieces)
    else:
        yield "["
        for place, row in enumerate(values):
            if place:
                yield ","
            yield from _array_lines(row)
        yield "]"


def _list_lines(items: Iterable[str]) -> Iterator[str]:
    yield "["
    for place, item in enumerate(items):
        yield f", {item}" if place else item
    yield "]"


def _check_size(manifest: Manifest, shown: FloatArray) -> None:
    if shown.size > MAX_PRINTED:
        raise LimitExceeded(
            f"model {manifest.model!r} version {manifest.version}: its answer to "
            f"{counted(len(shown), 'input')} has {shown.size} numbers, but at most {MAX_PRINTED} "
            "can be printed. Nothing was answered; send fewer inputs at a time."
        )


def labels(manifest: Manifest, outputs: FloatArray) -> list[str]:
    """Returns the name of each row's most likely class, or its index if classes have no names.

    Args:
        manifest: A classifier's manifest.
        outputs: Shape ``(B, C)``.

    Raises:
        DeviceError: the outputs have another shape.
        LimitExceeded: there are more than `MAX_PRINTED` rows.
    """
    _check_shape(manifest, outputs)
    classes = outputs.argmax(axis=-1)
    _check_size(manifest, classes)
    names = manifest.labels
    return [names[row] if row < len(names) else str(row) for row in classes.tolist()]


def _check_shape(manifest: Manifest, outputs: FloatArray) -> None:
    """Checks the outputs' shape, which for some inputs may differ from the self-test's."""
    dimensions = {"classification": 2, "next_token": 3}.get(manifest.kind)
    if dimensions is None or (outputs.ndim == dimensions and outputs.shape[-1] > 0):
        return
    raise DeviceError(
        f"model {manifest.model!r} version {manifest.version}: for these inputs its outputs have "
        f"shape {outputs.shape}, expected {dimensions} dimensions and at least one class. "
        "Nothing was answered; report this to its publisher, who can roll back to the earlier "
        "version."
    )
