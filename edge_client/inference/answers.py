"""Model outputs as text: labels, numbers or tokens, one line per input, or JSON.

The manifest's presentation decides the form, so that a device needs no code of a kind of problem.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping

import numpy as np

from edge_client.inference.named import outputs_by_name
from fedcore.artifacts import presentation
from fedcore.artifacts.manifest import Manifest
from fedcore.artifacts.parity import FloatArray
from fedcore.errors import DeviceError, LimitExceeded
from fedcore.observability.foreign import foreign
from fedcore.observability.words import counted

MAX_PRINTED = 4_000_000
"""Most numbers in one answer: 100 MB of text."""
_PIECE = 1 << 16
LABELLED = ("label", "binary", "labels")
"""Presentations that give an input as a whole the name of a class, or names of labels."""


def answers(manifest: Manifest, outputs: FloatArray) -> Iterable[str]:
    """Returns one line per input: its class or labels, the values, or the class at each position.

    Several labels are separated by spaces; the line of an input without any is empty.

    Lines are made lazily: a byte of output can take 20 bytes as text, and 50 in Python lists.

    Args:
        manifest: The model's manifest.
        outputs: Shape ``(B, ...)``.

    Raises:
        DeviceError: the outputs' shape does not fit the kind of model.
        LimitExceeded: more than `MAX_PRINTED` numbers would be printed.
    """
    if manifest.outputs is not None:
        return _named_answers(manifest, outputs)
    _check_shape(manifest, outputs)
    if manifest.presents == "labels":
        return (" ".join(map(foreign, names)) for names in label_sets(manifest, outputs))
    if manifest.presents in LABELLED:
        found = labels(manifest, outputs)
        return (foreign(label) for label in found)
    rows = presentation.decisions(outputs, manifest.presents)
    _check_size(manifest, rows)
    return (" ".join(f"{number:.6g}" for number in np.ravel(row)) for row in rows)


def _named_answers(manifest: Manifest, outputs: FloatArray) -> Iterator[str]:
    """Yields one line per input, such as ``species: cat; age: 4.2``."""
    _check_size(manifest, outputs)
    columns = [(name, answers(*each)) for name, each in _parts(manifest, outputs).items()]
    for row in zip(*(lines for _, lines in columns), strict=True):
        yield "; ".join(
            f"{foreign(name)}: {line}" for (name, _), line in zip(columns, row, strict=True)
        )


def answer_lines(manifest: Manifest, outputs: FloatArray) -> Iterator[str]:
    """Yields the lines of one JSON object: model, version, outputs, and labels where it has any.

    Where each output is the logit of one label, there are ``probabilities``, too. Several outputs
    are objects by name.

    Converts a limited number of outputs to text at a time, to save memory.

    Args:
        manifest: The model's manifest.
        outputs: Shape ``(B, ...)``.

    Raises:
        DeviceError: the outputs' shape does not fit the kind of model; nothing was yielded.
        LimitExceeded: there are more than `MAX_PRINTED` numbers; nothing was yielded.
    """
    parts = _parts(manifest, outputs)
    for of, values in parts.values():
        _check_shape(of, values)
    _check_size(manifest, outputs)
    head = json.dumps({"model": manifest.model, "version": manifest.version})
    yield head[:-1] + ', "outputs":'
    named = manifest.outputs is not None
    yield from _by_name({name: _array_lines(each) for name, (_, each) in parts.items()}, named)
    likely = {
        name: _array_lines(presentation.probabilities(each, of.presents))
        for name, (of, each) in parts.items()
        if of.presents in ("binary", "labels")
    }
    if likely:
        yield ', "probabilities":'
        yield from _by_name(likely, named)
    labelled = {
        name: _list_lines(
            json.dumps(names)
            for names in (label_sets if of.presents == "labels" else labels)(of, each)
        )
        for name, (of, each) in parts.items()
        if of.presents in LABELLED
    }
    if labelled:
        yield ', "labels":'
        yield from _by_name(labelled, named)
    yield "}"


def _parts(manifest: Manifest, outputs: FloatArray) -> dict[str, tuple[Manifest, FloatArray]]:
    """Returns each output by name, with the manifest as that of a model with this one alone."""
    found = outputs_by_name(manifest, outputs)
    if manifest.outputs is None:
        return {name: (manifest, each) for name, each in found.items()}
    return {one.name: (manifest.of_output(one), found[one.name]) for one in manifest.outputs}


def _by_name(entries: Mapping[str, Iterator[str]], named: bool) -> Iterator[str]:
    """Yields an object of the entries, or the only entry by itself where it has no name."""
    if not named:
        for each in entries.values():
            yield from each
        return
    for place, (name, each) in enumerate(entries.items()):
        yield (", " if place else "{") + json.dumps(name) + ": "
        yield from each
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
        manifest: The manifest of a model that presents one label for each input.
        outputs: Shape ``(B, C)``, or one logit for each input.

    Raises:
        DeviceError: the outputs have another shape.
        LimitExceeded: there are more than `MAX_PRINTED` rows.
    """
    _check_shape(manifest, outputs)
    classes = presentation.decisions(outputs, manifest.presents)
    _check_size(manifest, classes)
    return [_name(manifest, row) for row in classes.tolist()]


def label_sets(manifest: Manifest, outputs: FloatArray) -> list[list[str]]:
    """Returns the names of each row's labels, those with a positive logit; or their indices.

    Args:
        manifest: The manifest of a model that presents any number of labels.
        outputs: Logits, shape ``(B, L)``.

    Raises:
        DeviceError: the outputs have another shape.
        LimitExceeded: there are more than `MAX_PRINTED` outputs.
    """
    _check_shape(manifest, outputs)
    _check_size(manifest, outputs)
    found = presentation.decisions(outputs, manifest.presents)
    return [[_name(manifest, int(place)) for place in np.flatnonzero(row)] for row in found]


def _name(manifest: Manifest, place: int) -> str:
    return manifest.labels[place] if place < len(manifest.labels) else str(place)


def _check_shape(manifest: Manifest, outputs: FloatArray) -> None:
    """Checks the outputs' shape, which for some inputs may differ from the self-test's."""
    least, most = presentation.dimensions_of(manifest.presents)
    axis = 1 if manifest.presents == "dense" else -1
    fits = least <= outputs.ndim <= (most or outputs.ndim)
    if manifest.presents == "values" or (fits and outputs.shape[axis] > 0):
        return
    dimensions = f"{least}" if most == least else f"{least} or more" if most is None else "1 or 2"
    raise DeviceError(
        f"model {manifest.model!r} version {manifest.version}: for these inputs its outputs have "
        f"shape {outputs.shape}, expected {dimensions} dimensions and at least one class. "
        "Nothing was answered; report this to its publisher, who can roll back to the earlier "
        "version."
    )
