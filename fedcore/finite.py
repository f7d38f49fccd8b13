"""Non-finite numbers: detected in arrays in one pass, and replaced where JSON has none."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


def largest_magnitude(values: NDArray[np.floating[Any]]) -> float:
    """Returns the largest magnitude in a non-empty array, without a copy of it.

    The result is finite exactly if all values are: NaN if one of them is NaN.
    """
    return max(float(values.max()), -float(values.min()))


def all_finite(numbers: Iterable[float]) -> bool:
    """Returns whether no number is infinite or NaN."""
    return all(map(math.isfinite, numbers))


def finite_or_none(value: Any) -> Any:
    """Replaces floats that are not finite, which JSON doesn't support, by None.

    Looks into mappings and lists.
    """
    if isinstance(value, Mapping):
        return {name: finite_or_none(item) for name, item in value.items()}
    if isinstance(value, list):
        return [finite_or_none(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
