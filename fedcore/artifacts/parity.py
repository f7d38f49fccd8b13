"""Comparing what two models answer, in NumPy, so that devices can do it too."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float32]


def max_abs_error(reference: FloatArray, candidate: FloatArray) -> float:
    """The largest absolute difference between two arrays of one shape.

    It is infinite for a NaN, and where there is nothing to compare.
    """
    if not reference.size:
        return float("inf")
    difference = float(np.max(np.abs(reference.astype(np.float64) - candidate)))
    return difference if np.isfinite(difference) else float("inf")


def agreement(reference: FloatArray, candidate: FloatArray, *, kind: str) -> float:
    """How far two models decide alike, from 0 to 1.

    Args:
        reference: Outputs ``(N, ...)`` of the model that is compared with.
        candidate: Outputs of the same shape.
        kind: For ``classification`` and ``next_token`` the share of equal arg-maxima along the last
            axis; for ``regression`` one minus the RMS difference over the standard deviation of
            the reference, never below 0.
    """
    if kind == "regression":
        spread = float(np.std(reference)) or 1.0
        difference = reference.astype(np.float64) - candidate
        return max(0.0, 1.0 - float(np.sqrt(np.mean(np.square(difference)))) / spread)
    return float(np.mean(reference.argmax(axis=-1) == candidate.argmax(axis=-1)))
