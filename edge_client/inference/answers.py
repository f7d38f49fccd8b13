"""What a model's outputs say, in words."""

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
"""Numbers that one answer may have: 100 MB of text."""
_PIECE = 1 << 16


def answers(manifest: Manifest, outputs: FloatArray) -> Iterable[str]:
    """One line an input: the class, the values, or the most likely token at each position.

    A line is made when it is asked for: a byte of output can be 20 of text and 50 in lists.

    Args:
        manifest: Of the model.
        outputs: Shape ``(B, ...)``.

    Raises:
        DeviceError: they have not the shape of this kind of answer.
        LimitExceeded: there are more than `MAX_PRINTED` numbers to print.
    """
    _check_shape(manifest, outputs)
    if manifest.kind == "classification":
        found = labels(manifest, outputs)
        return (foreign(label) for label in found)
    rows = outputs if manifest.kind == "regression" else outputs.argmax(axis=-1)
    _check_size(manifest, rows)
    return (" ".join(f"{number:.6g}" for number in np.ravel(row)) for row in rows)


def answer_lines(manifest: Manifest, outputs: FloatArray) -> Iterator[str]:
    """Lines that make one JSON object: the model, its version, and all outputs.

    Of a classification the labels, too. Few numbers are in memory as text at a time.

    Raises:
        DeviceError, LimitExceeded: as `answers`; nothing was given then.
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
            f"model {manifest.model!r} version {manifest.version}: it answered "
            f"{counted(len(shown), 'input')} with {shown.size} numbers, and {MAX_PRINTED} at most "
            "are printed. Nothing was answered; ask for fewer inputs at a time."
        )


def labels(manifest: Manifest, outputs: FloatArray) -> list[str]:
    """The name of the most likely class of each row; its number where classes have no names.

    Args:
        manifest: Of a classification.
        outputs: Shape ``(B, C)``.

    Raises:
        DeviceError: they have another shape.
        LimitExceeded: there are more than `MAX_PRINTED`.
    """
    _check_shape(manifest, outputs)
    classes = outputs.argmax(axis=-1)
    _check_size(manifest, classes)
    names = manifest.labels
    return [names[row] if row < len(names) else str(row) for row in classes.tolist()]


def _check_shape(manifest: Manifest, outputs: FloatArray) -> None:
    """A model may answer some inputs in a shape that its golden ones did not show."""
    dimensions = {"classification": 2, "next_token": 3}.get(manifest.kind)
    if dimensions is None or (outputs.ndim == dimensions and outputs.shape[-1] > 0):
        return
    raise DeviceError(
        f"model {manifest.model!r} version {manifest.version}: for these inputs its outputs have "
        f"shape {outputs.shape}, expected {dimensions} dimensions and a class at least. Nothing "
        "was answered; tell its publisher, who can release the earlier version again."
    )
