"""Integers of any size, as vectors of 64-bit limbs: the value is ``sum(limb[k] * 2**32k)``.

Limbs are signed and may overlap, so adding to one is plain integer addition. `carry` makes room in
a limb by moving its upper half to the next.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Limb = NDArray[np.int64]
UNIT = 2**32
"""Value of 1 in a limb, in units of the limb below."""
MAX_LIMB = 2**62
"""Magnitudes of a limb stay below this, plus one `UNIT`."""
_BITS = 32
_MASK = UNIT - 1


def whole_parts(peak: float) -> int:
    """Returns how many limbs `add_whole` needs for integers of magnitude up to ``peak``."""
    count = 1
    while peak >= 2.0 ** (_BITS * count):
        count += 1
    return count


def add_whole(limbs: Sequence[Limb], values: NDArray[np.float64]) -> None:
    """Adds integers to limbs, in place: less than `UNIT` to each limb.

    Args:
        limbs: At least as many as `whole_parts` returns, each ``(D,)``.
        values: Shape ``(D,)``, integers; overwritten.
    """
    top = whole_parts(float(np.abs(values).max(initial=0.0))) - 1
    for place in range(top, 0, -1):
        unit = 2.0 ** (_BITS * place)
        share = np.trunc(values / unit)
        if share.any():  # else a write of zeros would allocate the limb's pages
            limbs[place][:] += share.astype(np.int64)
            values -= share * unit
    limbs[0][:] += values.astype(np.int64)


def carry(limbs: Sequence[Limb], place: int) -> None:
    """Moves all but the lower 32 bits of a limb to the next, in place; the total is unchanged."""
    over = limbs[place] >> _BITS
    if over.any():
        limbs[place][:] &= _MASK
        limbs[place + 1][:] += over


def to_floats(limbs: Sequence[Limb], out: NDArray[np.float64] | None = None) -> NDArray[np.float64]:
    """Returns the values, each rounded once to the nearest float64 (ties to even).

    The result depends only on the values, not on how they are split into limbs.

    Args:
        limbs: Each ``(D,)``; not changed.
        out: Memory for the usual case of one limb; allocated when None.
    """
    if len(limbs) == 1:
        if out is None:
            return limbs[0].astype(np.float64)
        np.copyto(out, limbs[0])
        return out
    own = [limb.copy() for limb in limbs]
    own.append(np.zeros_like(own[0]))
    _normalise(own)
    negative = own[-1] < 0
    for limb in own:
        np.negative(limb, out=limb, where=negative)
    _normalise(own)
    # Each limb is now in [0, 2**32), and the last one, which took the signs, is zero.
    below = np.zeros(len(own[0]), np.bool_)  # whether any limb below ``third`` is not zero
    found = np.zeros(len(own[0]))
    zero = np.zeros_like(own[0])
    for place, limb in enumerate(own):
        second = own[place - 1] if place > 0 else zero
        third = own[place - 2] if place > 1 else zero
        if place > 2:
            below |= own[place - 3] != 0
        leads = limb != 0  # the highest nonzero limb is written last
        if leads.any():
            found[leads] = _rounded(
                limb[leads], second[leads], third[leads], below[leads], _BITS * (place - 1)
            )
    return np.where(negative, -found, found)


def _normalise(limbs: Sequence[Limb]) -> None:
    for place in range(len(limbs) - 1):
        carry(limbs, place)


def _rounded(
    first: Limb, second: Limb, third: Limb, below: NDArray[np.bool_], exponent: int
) -> NDArray[np.float64]:
    """Returns ``(first * 2**32 + second + third / 2**32 + ...) * 2**exponent``, rounded once.

    Computes the leading 64 bits; the last one is sticky: it is set if any bit below is. The
    conversion to float64 keeps 53 bits and rounds correctly, as the rest shows whether it is more
    than half.
    """
    shift = (_BITS - np.frexp(first.astype(np.float64))[1]).astype(np.uint64)
    rest = np.uint64(_BITS) - shift
    high, middle, low = (limb.astype(np.uint64) for limb in (first, second, third))
    bits = (high << (shift + np.uint64(_BITS))) | (middle << shift) | (low >> rest)
    sticky = ((low & ((np.uint64(1) << rest) - np.uint64(1))) != 0) | below
    bits |= sticky.astype(np.uint64)
    found: NDArray[np.float64] = np.ldexp(
        bits.astype(np.float64), exponent - shift.astype(np.int64)
    )
    return found
