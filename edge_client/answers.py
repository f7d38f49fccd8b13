"""What a model's outputs say, in words."""

from __future__ import annotations

import numpy as np

from fedcore.artifacts.manifest import Manifest
from fedcore.artifacts.parity import FloatArray
from fedcore.errors import DeviceError
from fedcore.observability.foreign import foreign


def answers(manifest: Manifest, outputs: FloatArray) -> list[str]:
    """One line an input: the class, the values, or the most likely token at each position.

    Args:
        manifest: Of the model.
        outputs: Shape ``(B, ...)``.

    Raises:
        DeviceError: they have not the shape of this kind of answer.
    """
    _check_shape(manifest, outputs)
    if manifest.kind == "classification":
        return [foreign(label) for label in labels(manifest, outputs)]
    rows = outputs if manifest.kind == "regression" else outputs.argmax(axis=-1)
    return [" ".join(f"{number:.6g}" for number in np.ravel(row)) for row in rows]


def labels(manifest: Manifest, outputs: FloatArray) -> list[str]:
    """The name of the most likely class of each row; its number where classes have no names.

    Args:
        manifest: Of a classification.
        outputs: Shape ``(B, C)``.

    Raises:
        DeviceError: they have another shape.
    """
    _check_shape(manifest, outputs)
    classes = outputs.argmax(axis=-1)
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
        "was answered; tell whoever publishes, who can release the earlier version again."
    )
