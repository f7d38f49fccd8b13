"""How a device tells a model's answer, and how far the decisions of two models agree, in NumPy.

A released model's manifest names one of these forms, so that a device needs no code of the kind of
problem that the model solves. Does not import torch.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Outputs = NDArray[np.float32]

Presentation = Literal["label", "binary", "labels", "tokens", "dense", "values"]
"""``label``: the most likely of the classes on the last axis, one for each input.
``binary``: one of two classes, from one logit. ``labels``: all labels whose logit is positive.
``tokens``: the most likely class at each position, classes on the last axis.
``dense``: the most likely class at each position, classes on the axis after the batch.
``values``: the outputs themselves."""

_BY_KIND: dict[str, Presentation] = {
    "classification": "label",
    "next_token": "tokens",
    "regression": "values",
}
"""For manifests that state none: written before kinds other than these existed."""


def presentation_of(kind: str) -> Presentation:
    """Returns the form for a manifest that names a kind alone."""
    return _BY_KIND.get(kind, "values")


def dimensions_of(presentation: Presentation) -> tuple[int, int | None]:
    """Returns the least and the largest number of an output's dimensions, with the batch's."""
    return {
        "label": (2, 2),
        "binary": (1, 2),
        "labels": (2, 2),
        "tokens": (3, 3),
        "dense": (2, None),
        "values": (1, None),
    }[presentation]


def decisions(outputs: Outputs, presentation: Presentation) -> NDArray[Any]:
    """Returns what outputs ``(B, ...)`` decide: class numbers, yes or no for labels, or values.

    Args:
        outputs: The model's outputs; logits where classes are decided.
        presentation: The form; the outputs must have its number of dimensions.
    """
    if presentation in ("label", "tokens"):
        return np.asarray(outputs.argmax(axis=-1))
    if presentation == "dense":
        return np.asarray(outputs.argmax(axis=1))
    if presentation == "binary":
        return (outputs.reshape(len(outputs), -1)[:, 0] > 0).astype(np.int64)
    if presentation == "labels":
        return outputs > 0
    return outputs


def probabilities(outputs: Outputs, presentation: Presentation) -> Outputs:
    """Returns the probabilities that logits mean.

    Returns:
        For ``binary`` the probability of the second class, ``(B,)``; for ``labels`` one for each
        label, ``(B, L)``; for ``label``, ``tokens`` and ``dense`` those of all classes, in the
        outputs' shape, with a sum of 1 over the classes.

    Raises:
        ValueError: the form is ``values``, which has none.
    """
    wide = outputs.astype(np.float64)
    if presentation in ("binary", "labels"):
        found = np.exp(-np.logaddexp(0.0, -wide))
        if presentation == "binary":
            found = found.reshape(len(found), -1)[:, 0]
        return np.asarray(found, np.float32)
    if presentation == "values":
        raise ValueError("outputs presented as values have no probabilities")
    axis = 1 if presentation == "dense" else -1
    shifted = np.exp(wide - wide.max(axis=axis, keepdims=True))
    return np.asarray(shifted / shifted.sum(axis=axis, keepdims=True), np.float32)
