"""Compares the outputs of two models, in NumPy, so that devices without torch can do it, too."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedcore.artifacts.presentation import Presentation, decisions

FloatArray = NDArray[np.float32]


def max_abs_error(reference: FloatArray, candidate: FloatArray) -> float:
    """Returns the largest absolute difference between two arrays of one shape.

    The result is infinite for a NaN, and for empty arrays.
    """
    if not reference.size:
        return float("inf")
    difference = float(np.max(np.abs(reference.astype(np.float64) - candidate)))
    return difference if np.isfinite(difference) else float("inf")


def agreement(reference: FloatArray, candidate: FloatArray, *, presentation: Presentation) -> float:
    """Returns how well the decisions of two models agree, from 0 to 1.

    Args:
        reference: Outputs ``(N, ...)`` of the reference model.
        candidate: Outputs of the other model, of the same shape.
        presentation: How devices tell an answer. Where they tell classes or labels, the result is
            the share of equal decisions; for ``values`` one minus the RMS difference over the
            standard deviation of the reference, never below 0.
    """
    if presentation == "values":
        spread = float(np.std(reference)) or 1.0
        difference = reference.astype(np.float64) - candidate
        return max(0.0, 1.0 - float(np.sqrt(np.mean(np.square(difference)))) / spread)
    same = decisions(reference, presentation) == decisions(candidate, presentation)
    return float(np.mean(same))
